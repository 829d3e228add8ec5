"""The fast distillation losses against the plain formula in fp64, values and gradients.

The Triton kernels run in Triton's interpreter in a process of its own, because triton reads this setting
when it is imported.
"""

import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_dms.kernels import kl, linear_kl
from megatron_dms.kernels.kl import distillation_kl
from megatron_dms.kernels.linear_kl import linear_kl as fused
from tests.support.kl_cases import (
    CASES,
    FP64,
    PLAIN,
    SPREAD,
    Case,
    compare,
    expected,
    fused_by_hand,
    make_logits,
    projections,
)
from tests.support.ranks import run_ranks
from tests.support.triton_process import hide_nothing, run

COLUMNS = {"uneven": (80, 51), "a rank without columns": (131, 0)}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss run in several chunks, the last one not full."""
    monkeypatch.setattr(kl, "CHUNK_BYTES", 4 * 4 * 131)


@pytest.mark.parametrize("direction", PLAIN)
@pytest.mark.parametrize("case", [*CASES, Case("fp64", dtype=FP64)], ids=lambda case: case.name)
def test_kl(case: Case, direction: str, small_chunks: None) -> None:
    """Catches: the other direction, padding counted, a temperature without its factor in the gradient, a
    token of a chunk left out, the incoming gradient ignored, a gradient in the padding."""
    student, teacher, weights = make_logits(case)
    student.requires_grad_()
    loss = distillation_kl(student, teacher, direction, case.columns, case.temperature)
    loss.backward(weights.to(loss.dtype))
    compare(case, direction, loss.detach(), student.grad)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("interpreted") / "out.pt"
    return torch.load(run(Path(__file__), out=out, TRITON_INTERPRET="1"))


def interpret(out: Path) -> None:
    """Save every case, computed by the Triton kernels."""
    from megatron_dms.kernels import kl_rows

    hide_nothing()
    kl_rows.BLOCK = 64
    found = {}
    for case in CASES:
        for direction in PLAIN:
            student, teacher, weights = make_logits(case)
            rows = (student.view(-1, case.width), teacher.view(-1, case.width))
            settings = (direction, case.columns, case.temperature, None)
            loss = kl_rows.kl_with_slope_triton(*rows, *settings, wants_slope=True)
            gradient = teacher * weights[..., None].to(teacher.dtype)
            found[case.name, direction] = (loss.view(case.shape), gradient)
    torch.save(found, out)


@pytest.mark.slow
@pytest.mark.parametrize("direction", PLAIN)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton(case: Case, direction: str, interpreted: dict) -> None:
    """Catches: sums not shrunk to a new peak, a row's last block, log-sum-exps that cancel, padding."""
    compare(case, direction, *interpreted[case.name, direction])


def test_the_teacher_is_overwritten_for_a_gradient_only() -> None:
    """The teacher's logits stay as they are without a gradient, and the loss can be differentiated once.
    Catches: validation that destroys logits, a second backward that multiplies again."""
    student, teacher, _ = make_logits(CASES[0])
    before = teacher.clone()
    distillation_kl(student, teacher, "teacher_student")
    assert torch.equal(teacher, before)
    student.requires_grad_()
    with torch.no_grad():
        distillation_kl(student, teacher, "teacher_student")
    assert torch.equal(teacher, before)
    loss = distillation_kl(student, teacher, "teacher_student").sum()
    assert not torch.equal(teacher, before)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        loss.backward()


def on_two_processes(rank: int, folder: str) -> None:
    """Save losses and gradients of one rank, which has its columns and two of padding."""
    torch.set_num_threads(1)
    kl.CHUNK_BYTES, linear_kl.MIN_CHUNK = 4 * 4 * 131, 5  # several chunks, here too
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for split, columns in COLUMNS.items():
        own = slice(sum(columns[:rank]), sum(columns[: rank + 1]))
        for direction in PLAIN:
            logits = make_logits(SPREAD)
            padding = max(columns) + 2 - columns[rank]
            student, teacher = (
                torch.nn.functional.pad(x[..., own], (0, padding), value=5.0) for x in logits[:2]
            )
            student.requires_grad_()
            settings = (direction, columns[rank], SPREAD.temperature, dist.group.WORLD)
            loss = distillation_kl(student, teacher, *settings)
            loss.backward(logits[2].double())
            assert (student.grad[..., columns[rank] :] == 0).all()
            found[split, direction] = (loss.detach(), student.grad[..., : columns[rank]])
            hidden, weight, other_hidden, other_weight, weights = projections()
            rows = slice(own.start, own.stop)
            own_rows = [torch.nn.functional.pad(x[rows], (0, 0, 0, padding)) for x in (weight, other_weight)]
            parts = [hidden.requires_grad_(), own_rows[0].requires_grad_()]
            total, _ = fused(*parts, other_hidden, own_rows[1], weights, *settings)
            total.backward()
            d_weight = parts[1].grad[: columns[rank]]
            found[split, direction, "fused"] = (total.detach(), parts[0].grad, d_weight)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_spread_vocabulary_gives_the_loss_of_a_whole_one() -> None:
    """Runs two gloo processes with 80 + 51 and 131 + 0 columns, fp64 to 1e-12. Catches: a softmax over a
    rank's own columns, a sum not reduced, the gradient of hidden states not added up, a rank without
    columns."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(on_two_processes, folder, 2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    close = {"rtol": 1e-11, "atol": 1e-12}
    for split in COLUMNS:
        for direction in PLAIN:
            wanted, gradient = expected(SPREAD, direction)
            for rank in ranks:
                torch.testing.assert_close(rank[split, direction][0], wanted, **close)
            whole = torch.cat([rank[split, direction][1] for rank in ranks], dim=-1)
            torch.testing.assert_close(whole, gradient, **close)
            _, total, d_hidden, d_weight = fused_by_hand(direction)
            for rank in ranks:
                torch.testing.assert_close(rank[split, direction, "fused"][0], total, **close)
                torch.testing.assert_close(rank[split, direction, "fused"][1], d_hidden, **close)
            whole = torch.cat([rank[split, direction, "fused"][2] for rank in ranks])
            torch.testing.assert_close(whole, d_weight, **close)


@pytest.mark.parametrize("direction", PLAIN)
def test_fused_projection(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projection runs in several chunks, the last one not full. Catches: a chunk that replaces the
    gradient of the last, weights of tokens or the incoming gradient ignored, padding, a temperature
    applied twice."""
    monkeypatch.setattr(linear_kl, "MIN_CHUNK", 5)
    hidden, weight, *rest = projections()
    hidden.requires_grad_(), weight.requires_grad_()
    total, losses = fused(hidden, weight, *rest, direction, 120, 1.5)
    (3 * total).backward()
    wanted, wanted_total, d_hidden, d_weight = fused_by_hand(direction, 120)
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(losses, wanted, **close)
    torch.testing.assert_close(total, wanted_total, **close)
    torch.testing.assert_close(hidden.grad, 3 * d_hidden, **close)
    torch.testing.assert_close(weight.grad, 3 * d_weight, **close)
    assert not losses.requires_grad


def test_fused_projection_of_a_frozen_weight() -> None:
    """Catches: a gradient that nobody wants, made all the same; logits' gradient from the weight's switch."""
    hidden, weight, *rest = projections()
    total, _ = fused(hidden.requires_grad_(), weight, *rest, "teacher_student", temperature=1.5)
    total.backward()
    torch.testing.assert_close(hidden.grad, fused_by_hand("teacher_student")[2], rtol=1e-11, atol=1e-12)
    assert weight.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(3, 5)}, r"of one shape.*\(3, 4\).*\(3, 5\)"),
        ({"teacher": torch.zeros(3, 4, dtype=FP64)}, "float32 on cpu and .* torch.float64"),
        ({"teacher": torch.zeros(4, 3).T}, "expected contiguous logits"),
        ({"direction": "forward"}, "direction is 'forward'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_bad_inputs_are_refused(change: dict, message: str) -> None:
    """Catches: a check that is missing."""
    good = {"student": torch.zeros(3, 4), "teacher": torch.zeros(3, 4), "direction": "teacher_student"}
    with pytest.raises(ValueError, match=message):
        distillation_kl(**good | change)


def test_bad_inputs_of_the_fused_projection_are_refused() -> None:
    """Catches: shapes that would broadcast."""
    hidden, weight, other_hidden, other_weight, weights = projections()
    with pytest.raises(ValueError, match=r"found .*\(130, 8\)"):
        fused(hidden, weight, other_hidden, other_weight[:-1], weights, "teacher_student")
    with pytest.raises(ValueError, match=r"found .*\(19, 1\)"):
        fused(hidden, weight, other_hidden, other_weight, weights[:, None], "teacher_student")


if __name__ == "__main__":
    interpret(Path(sys.argv[1]))
