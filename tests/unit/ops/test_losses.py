"""Distillation and compression losses against torch's own formulas and numbers worked out by hand.

Tolerances: 1e-12 in fp64, and 1e-5 relative in fp32, for values and gradients. The vocabulary spread over
two processes equals one process to 1e-12 in fp64.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.ops.losses import compression_loss, kl_student_teacher, kl_teacher_student
from tests.support.ranks import run_ranks

VOCAB = 131
COLUMNS = {"uneven": (80, 51), "a rank without columns": (131, 0)}
DIRECTIONS = {"teacher_student": kl_teacher_student, "student_teacher": kl_student_teacher}


def by_torch(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """Return sum p (log p - log q) per token; torch's kl_div(input, target) is KL(target

    input).
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    first, second = (log_t, log_s) if direction == "teacher_student" else (log_s, log_t)
    return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)


def logits(dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of student and teacher [4, 3, VOCAB], and the gradient that arrives at the loss, [4,
    3]."""
    generator = torch.Generator().manual_seed(5)
    shape = (4, 3, VOCAB)
    student, teacher = (
        scale * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return student.to(dtype), teacher.to(dtype), torch.linspace(-1, 2, 12).view(4, 3).to(dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_kl_and_its_gradient(direction: str, dtype: torch.dtype, tolerance: float) -> None:
    """Catches: the wrong direction, a gradient of the other direction, the incoming gradient ignored, the
    gradient of KL(student || teacher) without its -loss term."""
    student, teacher, grad = logits(dtype)
    reference = student.double().requires_grad_()
    expected = by_torch(reference, teacher.double(), direction)
    expected.backward(grad.double())
    student.requires_grad_()
    found = DIRECTIONS[direction](student, teacher)
    found.backward(grad)
    assert found.dtype == dtype and found.shape == (4, 3)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


def test_direction_by_hand() -> None:
    """Teacher (1/2, 1/2), student (1/4, 3/4): KL(teacher || student) = ln(2) - ln(3) / 2 and
    KL(student || teacher) = ln(3) * 3 / 4 - ln(2). Catches: the two directions swapped, here or in the table
    that --dms-kl is looked up in (see below)."""
    ln2, ln3 = torch.tensor([2.0, 3.0], dtype=torch.float64).log()
    student, teacher = torch.stack([ln2 * 0, ln3]), torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(kl_teacher_student(student, teacher), ln2 - ln3 / 2)
    torch.testing.assert_close(kl_student_teacher(student, teacher), 0.75 * ln3 - ln2)


@pytest.mark.parametrize("kl", DIRECTIONS.values())
def test_equal_logits_lose_nothing(kl) -> None:
    """Logits that differ by a constant lose nothing either. Catches: logits taken for log-probabilities."""
    student, _, grad = logits()
    student.requires_grad_()
    loss = kl(student, student.detach() + 7)
    loss.backward(grad)
    assert loss.abs().max() < 1e-12 and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kl", DIRECTIONS.values())
def test_gradcheck(kl) -> None:
    """Uses finite differences. Catches: a closed form that agrees with a wrong reference."""
    student, teacher, _ = logits()
    assert torch.autograd.gradcheck(kl, (student[:1, :2, :9].clone().requires_grad_(), teacher[:1, :2, :9]))


@pytest.mark.parametrize("kl", DIRECTIONS.values())
def test_no_gradient_reaches_the_teacher(kl) -> None:
    """Catches: a teacher that is trained towards the student."""
    student, teacher, grad = logits()
    student.requires_grad_(), teacher.requires_grad_()
    kl(student, teacher).backward(grad)
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bf16_logits_and_far_tails(direction: str) -> None:
    """bf16 logits hundreds apart: computed in fp32, finite, gradient in bf16 (one rounding, 2**-8).
    Catches: a softmax in bf16, exp without the maximum taken off, 0 * inf in the tails."""
    student, teacher, _ = logits(torch.bfloat16, scale=100.0)
    student.requires_grad_()
    found = DIRECTIONS[direction](student, teacher)
    found.sum().backward()
    reference = student.detach().double().requires_grad_()
    expected = by_torch(reference, teacher.double(), direction)
    expected.sum().backward()
    assert found.dtype == torch.float32 and student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=2**-7, atol=1e-3)


def on_two_processes(rank: int, folder: str) -> None:
    """Save loss and gradient of every split and direction on one rank, which holds its columns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for split, columns in COLUMNS.items():
        for direction, kl in DIRECTIONS.items():
            student, teacher, grad = logits()
            own = student.split(columns, dim=-1)[rank].clone().requires_grad_()
            loss = kl(own, teacher.split(columns, dim=-1)[rank], dist.group.WORLD)
            loss.backward(grad)
            results[split, direction] = (loss.detach(), own.grad)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_spread_vocabulary_gives_the_loss_of_a_whole_one() -> None:
    """Runs two gloo processes with 80 + 51 and 131 + 0 columns, forward and gradient, fp64 to 1e-12.
    Catches: a softmax over a rank's own columns, the maximum or a sum not reduced, a loss that only one
    rank has, the maximum of no columns, a gradient counted twice."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(on_two_processes, folder, 2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    for split, direction in ranks[0]:
        student, teacher, grad = logits()
        student.requires_grad_()
        expected = by_torch(student, teacher, direction)
        expected.backward(grad)
        for loss, _ in (rank[split, direction] for rank in ranks):
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        gradient = torch.cat([rank[split, direction][1] for rank in ranks], dim=-1)
        torch.testing.assert_close(gradient, student.grad, rtol=1e-12, atol=1e-12)


def test_compression_loss_by_hand() -> None:
    """max(alpha* - mean, 0) per sample, then the mean. Catches: a two-sided loss (the sample above the target
    gives 0, not 0.3), the clamp after the mean over samples (0.1 instead of 0.2), a mean over the samples
    below the target only (0.3)."""
    mean_alpha = torch.tensor([0.1, 0.8, 0.3], requires_grad=True)
    loss = compression_loss(mean_alpha, 0.5)
    assert loss.item() == pytest.approx((0.4 + 0 + 0.2) / 3)
    loss.backward()
    torch.testing.assert_close(mean_alpha.grad, torch.tensor([-1 / 3, 0, -1 / 3]))
    assert compression_loss(torch.tensor([0.0, 0.2]), 0.0).item() == 0  # CR 1 asks for nothing


@pytest.mark.parametrize(("rank", "own"), [(0, 68), (1, 63), (2, 0)])
def test_distillation_leaves_vocabulary_padding_out(
    rank: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """131 tokens padded to 204 over three ranks: 68 + 63 + 0 columns count. Catches: padding in the
    softmax, a count by the padded size, samples and tokens not transposed."""
    from megatron_dms.training import teacher as module  # late: imports Megatron and modelopt

    group, calls = SimpleNamespace(size=lambda: 3, rank=lambda: rank), []
    monkeypatch.setattr(module, "distillation_kl", lambda *args: (calls.append(args), args[0].sum(-1))[1])
    student, teacher = torch.randn(5, 2, 68), torch.randn(5, 2, 68)
    dms = DMSConfig(kl="student_teacher", kl_temperature=1.5)
    assert module.TokenKL(dms, VOCAB, group)((student, None), (teacher, None)).shape == (2, 5)
    assert calls == [(student, teacher, "student_teacher", own, 1.5, group)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distillation_by_direction(direction: str) -> None:
    """Three columns of padding on one rank. Catches: the wrong KL direction behind --dms-kl, padding
    counted."""
    from megatron_dms.training.teacher import TokenKL

    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    padded = [F.pad(part, (0, 3), value=2.0) for part in logits()[:2]]
    found = TokenKL(DMSConfig(kl=direction), VOCAB, alone)((padded[0], None), (padded[1], None))
    torch.testing.assert_close(found, by_torch(*logits()[:2], direction).T)
