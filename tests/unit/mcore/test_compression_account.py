"""The compression account: its sums, and the gradient that it hands to each decision.

The gradient is compared with plain autograd over the whole model. Tolerance: 1e-6 relative (sums in fp32).
"""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dms.mcore.compression_account import CompressionAccount, ModelShape, attach_compression_loss
from megatron_dms.ops.eviction import soft_eviction
from megatron_dms.ops.losses import compression_loss
from tests.support.ranks import run_ranks

L, G, B, T = 2, 2, 4, 8
TARGET, WEIGHT, TEMPERATURE = 0.5, 3.0, 0.7
LENGTHS = (8, 6, 8, 5)  # valid tokens of each sample
# Evicted share by sample, layer and KV head. Only samples 0 and 3 have a mean below 1/2. But in sample 0
# layer 0 and head 0 are above it, and in sample 1 layer 1 and head 1 are below it: a clamp for each layer or
# stage, or for each head or tensor-parallel rank, gives other gradients. Sample 2 is exactly at the target.
SHARES = (
    ((1, 0.25), (0.125, 0)),
    ((1, 5 / 6), (4 / 6, 0)),
    ((0.5, 0.5), (0.5, 0.5)),
    ((0, 0), (0.2, 0.2)),
)


def logits() -> Tensor:
    """Return logits [L, B, G, T] that evict the first valid tokens of each head, and all padding."""
    generator = torch.Generator().manual_seed(3)
    z = torch.rand(L, B, G, T, generator=generator) + 0.1
    for b, (length, shares) in enumerate(zip(LENGTHS, SHARES, strict=True)):
        for layer, heads in enumerate(shares):
            for head, share in enumerate(heads):
                z[layer, b, head, round(share * length) : length] *= -1
    return z


def valid_tokens() -> Tensor:
    return torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]


def account(shape: ModelShape | None = None, **changes: float) -> CompressionAccount:
    shape = shape or ModelShape(layers=L, groups=G, local_layers=L, ranks=None)
    settings = {"target": TARGET, "loss_weight": WEIGHT} | changes
    return CompressionAccount(shape, tokens=torch.tensor(LENGTHS).float(), **settings)


def forward(
    z: Tensor, own: CompressionAccount, layers: list[int], heads: list[int], repeat: int = 1
) -> list[Tensor]:
    """Run the part of a forward pass that decides; return log_keep of each layer with the account
    attached."""
    kept = []
    for layer in layers:
        eviction = soft_eviction(z[layer][:, heads], torch.zeros(()), TEMPERATURE)
        for _ in range(repeat):
            own.report(layer, torch.tensor(heads), eviction.alpha, eviction.hard, valid_tokens())
        kept.append(attach_compression_loss(eviction.log_keep, eviction.alpha, valid_tokens(), own))
    return kept


def by_autograd(target: float = TARGET, weight: float = WEIGHT) -> Tensor:
    """Return d (weight * loss) / dz, from autograd with the whole model's decisions in one tensor,
    straight through."""
    z = logits().requires_grad_()
    hard = soft_eviction(z, torch.zeros(()), TEMPERATURE).hard * valid_tokens()[:, None]
    mean_alpha = hard.sum(dim=(0, 2, 3)) / (torch.tensor(LENGTHS) * L * G)
    (weight * compression_loss(mean_alpha, target - 1e-6)).backward()  # at the target itself: no gradient
    return z.grad


def test_sums_by_brute_force() -> None:
    """Catches: padding counted, soft and hard swapped, the tokens of a batch shared out equally, layers or
    heads in the wrong place of the picture."""
    own, z = account(), logits()
    forward(z, own, [0, 1], [0, 1])
    alpha = torch.sigmoid(z / TEMPERATURE)
    for hard, decisions in ((True, (alpha > 0.5).float()), (False, alpha)):
        expected = [
            torch.stack(
                [decisions[la, b, g, t] for la in range(L) for g in range(G) for t in range(LENGTHS[b])]
            )
            .mean()
            .item()
            for b in range(B)
        ]
        assert own.mean_alpha(hard).tolist() == pytest.approx(expected, rel=1e-6)
    per_head = [
        [sum(float(alpha[la, b, g, t] > 0.5) for b in range(B) for t in range(LENGTHS[b])) for g in range(G)]
        for la in range(L)
    ]
    assert own.evicted_per_head().tolist() == per_head


def test_a_recomputed_layer_counts_once() -> None:
    """Catches: decisions doubled by full or selective recomputation."""
    once, twice = account(), account()
    forward(logits(), once, [0, 1], [0, 1])
    forward(logits(), twice, [0, 1], [0, 1], repeat=2)
    for hard in (True, False):
        assert torch.equal(once.mean_alpha(hard), twice.mean_alpha(hard))
    assert torch.equal(once.evicted_per_head(), twice.evicted_per_head())


def test_a_missing_layer_is_an_error() -> None:
    """Catches: a mean over the layers that happened to report, in a forward pass cut short."""
    own = account()
    forward(logits(), own, [0], [0, 1])
    with pytest.raises(RuntimeError, match="1 of 2 layers"):
        own.mean_alpha(hard=True)


@pytest.mark.parametrize("target", [0.0, 0.3, TARGET, 0.9])
def test_gradient_equals_autograd_over_the_whole_model(target: float) -> None:
    """Catches: a clamp for each layer or stage, a two-sided loss, the mean over samples or over B L G T
    wrong, the soft mean held against the target, the sign."""
    own, z = account(target=target), logits().requires_grad_()
    sum(part.sum() * 0 for part in forward(z, own, [0, 1], [0, 1])).backward()
    torch.testing.assert_close(z.grad, by_autograd(target), rtol=1e-6, atol=1e-9)


def test_who_gets_a_gradient() -> None:
    """Samples 0 and 3 are below the target, 1 above, 2 exactly at it. Catches: padding that is trained, <=
    for < (sample 2), a clamp per layer (sample 0's layer 0 without, sample 1's layer 1 with a gradient)."""
    own, z = account(), logits().requires_grad_()
    assert own_means(z) == pytest.approx([0.34375, 0.625, 0.5, 0.1])
    sum(part.sum() * 0 for part in forward(z, own, [0, 1], [0, 1])).backward()
    touched = z.grad != 0
    expected = torch.tensor([True, False, False, True])[:, None] & valid_tokens()
    assert torch.equal(touched, expected[None, :, None].expand_as(touched))
    assert (z.grad <= 0).all()  # a step downhill raises the logits, that is, evicts more


def own_means(z: Tensor) -> list[float]:
    own = account()
    forward(z, own, [0, 1], [0, 1])
    return own.mean_alpha(hard=True).tolist()


def test_loss_weight_scales_and_log_keep_passes_through() -> None:
    """Catches: a weight that is ignored (--dms-compression-weight 0 must train nothing), log_keep's own
    gradient lost, doubled or scaled, log_keep changed on its way."""
    upstream = torch.randn(L, B, G, T, generator=torch.Generator().manual_seed(8))
    gradients = {}
    for weight in (0.0, 1.0, 2.5):
        own, z = account(loss_weight=weight), logits().requires_grad_()
        kept = torch.stack(forward(z, own, [0, 1], [0, 1]))
        plain = soft_eviction(z, torch.zeros(()), TEMPERATURE).log_keep
        assert torch.equal(kept, plain)
        (kept * upstream).sum().backward()
        gradients[weight] = z.grad
    z = logits().requires_grad_()
    (soft_eviction(z, torch.zeros(()), TEMPERATURE).log_keep * upstream).sum().backward()
    torch.testing.assert_close(gradients[0.0], z.grad)
    for weight in (1.0, 2.5):
        torch.testing.assert_close(
            gradients[weight] - z.grad, by_autograd(weight=weight), rtol=1e-4, atol=1e-7
        )


PARTS = {"a layer each": ([[0], [1]], [[0, 1]] * 2), "a head each": ([[0, 1]] * 2, [[0], [1]])}


def on_two_processes(rank: int, folder: str) -> None:
    """Run pipeline stages (a layer each), then tensor-parallel ranks (a head of every layer each)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, (layers, heads) in PARTS.items():
        shape = ModelShape(layers=L, groups=G, local_layers=len(layers[rank]), ranks=dist.group.WORLD)
        own, z = account(shape), logits().requires_grad_()
        sum(part.sum() * 0 for part in forward(z, own, layers[rank], heads[rank])).backward()
        results[name] = (z.grad, own.mean_alpha(hard=True), own.evicted_per_head())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_clamp_is_on_the_mean_over_all_ranks() -> None:
    """Two gloo processes give the gradient of one. Catches: clamp per stage or per tensor-parallel rank
    (no all-reduce: sample 0's first layer and sample 1's second come out wrong), the sums reduced before
    the last layer has reported, a count of the rank's own layers or heads."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(on_two_processes, folder, 2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    single = account()
    forward(logits(), single, [0, 1], [0, 1])
    for name in PARTS:
        gradient = ranks[0][name][0] + ranks[1][name][0]  # each rank's is zero where it holds nothing
        torch.testing.assert_close(gradient, by_autograd(), rtol=1e-6, atol=1e-9)
        for rank in ranks:
            assert torch.equal(rank[name][1], single.mean_alpha(hard=True)), name
            assert torch.equal(rank[name][2], single.evicted_per_head()), name
