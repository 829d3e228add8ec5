"""The exchange of heads for tokens under context parallelism: what arrives where, and what comes back.

It runs in four gloo processes in fp64, on numbers that are all different.
"""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dms.mcore.context_parallel import HeadExchange, own_tokens
from tests.support.ranks import run_ranks

PROCESSES, CHUNK, B, D, FURTHER = 4, 3, 2, 5, 2  # odd chunks; values are wider than keys by FURTHER
# (C, H, G): several KV heads for a rank, one for each, one for two and for four; at C 2 there are two groups
CASES = [(1, 6, 3), (2, 12, 6), (2, 6, 2), (4, 8, 4), (4, 8, 2), (4, 4, 1), (2, 2, 1)]


def whole(heads: int, tokens: int, width: int, seed: int) -> Tensor:
    """Return [T, B, heads, width], the same on every rank."""
    return torch.randn(tokens, B, heads, width, generator=torch.Generator().manual_seed(seed)).double()


def exchange_and_back(C: int, H: int, G: int, group: dist.ProcessGroup) -> dict[str, object]:
    """Save what one rank of C sees."""
    T = 2 * C * CHUNK
    batch = {name: torch.arange(T).expand(B, T) for name in ("tokens", "labels", "loss_mask", "position_ids")}
    batch = own_tokens(batch | {"valid": torch.ones(B, T)}, group)
    places = batch["position_ids"][0]
    parts = [whole(H, T, D, 1), whole(G, T, D, 2), whole(G, T, D + FURTHER, 3)]
    own = [part[places].requires_grad_() for part in parts]
    exchange = HeadExchange(group, G)
    seen = exchange.to_whole_sequence(*own)
    back = exchange.to_own_tokens(seen[0])
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(10 + group.rank())).double()
               for x in seen]  # fmt: skip
    sum((x * weight).sum() for x, weight in zip(seen, weights, strict=True)).backward()
    return {
        **{
            "places": places,
            "valid": batch["valid"],
            "seen": [x.detach() for x in seen],
            "back": back.detach(),
        },
        **{"weights": weights, "gradients": [x.grad for x in own]},
        **{"first": exchange.first_group, "groups": exchange.groups, "counts": exchange.counts},
    }


def on_four_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    groups = {size: dist.new_subgroups(size)[0] for size in (1, 2, 4)}
    torch.save([exchange_and_back(C, H, G, groups[C]) for C, H, G in CASES], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found() -> list[list[dict]]:
    """Return what each rank of the first group saw, by case."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(on_four_processes, folder, PROCESSES)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(PROCESSES)]
    return [[ranks[rank][case] for rank in range(C)] for case, (C, _, _) in enumerate(CASES)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "C{} H{} G{}".format(*CASES[case]))
def test_every_rank_sees_whole_sequences_of_its_heads(case: int, found: list[list[dict]]) -> None:
    """The tokens of a rank's heads come in natural order, and the rank gets its own tokens back. Catches:
    chunks in the order of the ranks, a query head beside another group's keys, values cut at the keys'
    width, samples' ids and padding cut like tokens."""
    C, H, G = CASES[case]
    T = 2 * C * CHUNK
    query, key, value = whole(H, T, D, 1), whole(G, T, D, 2), whole(G, T, D + FURTHER, 3)
    for rank, result in enumerate(found[case]):
        chunks = torch.arange(T).view(2 * C, CHUNK)
        assert torch.equal(result["places"], torch.cat([chunks[rank], chunks[2 * C - 1 - rank]]))
        assert result["valid"].shape == (B, T)
        queries = range(rank * H // C, (rank + 1) * H // C)
        groups = sorted({head * G // H for head in queries})  # whose keys these heads read
        assert groups == list(range(result["first"], result["first"] + result["groups"]))
        for seen, expected in zip(
            result["seen"], (query[:, :, list(queries)], key[:, :, groups], value[:, :, groups]), strict=True
        ):
            assert torch.equal(seen, expected)
        assert torch.equal(result["back"], query[result["places"]])
    counted = [
        result["first"] + g for result in found[case] if result["counts"] for g in range(result["groups"])
    ]
    assert counted == list(range(G)), "each KV head's decisions count once"


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "C{} H{} G{}".format(*CASES[case]))
def test_gradients_come_back_to_their_tokens(case: int, found: list[list[dict]]) -> None:
    """A KV head that several ranks share gets the sum of their gradients. Catches: a backward pass in another
    order, a copy whose gradient is lost, a mean for the sum."""
    C, H, G = CASES[case]
    T = 2 * C * CHUNK
    sums = [torch.zeros(T, B, heads, width).double() for heads, width in ((H, D), (G, D), (G, D + FURTHER))]
    for rank, result in enumerate(found[case]):
        first, groups = result["first"], result["groups"]
        for total, weight, place in zip(
            sums,
            result["weights"],
            (slice(rank * H // C, (rank + 1) * H // C), *[slice(first, first + groups)] * 2),
            strict=True,
        ):
            total[:, :, place] += weight
    for result in found[case]:
        for gradient, total in zip(result["gradients"], sums, strict=True):
            torch.testing.assert_close(gradient, total[result["places"]], rtol=1e-14, atol=1e-14)
