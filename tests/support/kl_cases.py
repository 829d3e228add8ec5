"""Cases and fp64 references of the fast distillation losses, for the CPU and the GPU tests."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dms.ops.losses import kl_student_teacher, kl_teacher_student

PLAIN = {"teacher_student": kl_teacher_student, "student_teacher": kl_student_teacher}
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    name: str
    dtype: torch.dtype = FP32
    shape: tuple[int, ...] = (7, 3)
    width: int = 140
    columns: int = 131
    temperature: float = 1.0
    scale: float = 3.0
    """Standard deviation of the logits."""
    apart: float = 1.0
    """Of teacher and student, in units of `scale`."""


CASES = [
    Case("fp32"),
    Case("bf16", dtype=BF16),
    Case("fp16", dtype=FP16),
    Case("one token, one column", shape=(1,), width=1, columns=1),
    Case("no padding", columns=140),
    Case("much padding", width=300),
    Case("temperature 2.5", temperature=2.5),
    Case("temperature 0.5, bf16", temperature=0.5, dtype=BF16),
    Case("logits far apart", scale=100.0),
    Case("almost the same", apart=1e-3),
    Case("long rows", shape=(3,), width=9001, columns=8999),
]


def make_logits(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of student and teacher [*shape, width], and weights [*shape].

    The padding of the logits holds numbers that must not matter.
    """
    generator = torch.Generator().manual_seed(9)
    teacher = case.scale * torch.randn(*case.shape, case.width, generator=generator)
    student = teacher + case.apart * case.scale * torch.randn(*case.shape, case.width, generator=generator)
    for logits in (student, teacher):
        logits[..., case.columns :] = 1e4
    weights = torch.rand(case.shape, generator=generator) - 0.2
    return student.to(device, case.dtype), teacher.to(device, case.dtype), weights.to(device)


def expected(case: Case, direction: str) -> tuple[Tensor, Tensor]:
    """Return the loss [*shape] and its gradient [*shape, width], in fp64 on the CPU."""
    student, teacher, weights = make_logits(case)
    exact = student.double().requires_grad_()
    own = (x[..., : case.columns] / case.temperature for x in (exact, teacher.double()))
    loss = PLAIN[direction](*own)
    loss.backward(weights.double())
    return loss.detach(), exact.grad


def compare(case: Case, direction: str, loss: Tensor, gradient: Tensor) -> None:
    """Assert agreement within the rounding of the log-probabilities and of the gradient's own type."""
    wanted, wanted_gradient = expected(case, direction)
    exact = torch.promote_types(case.dtype, FP32)
    assert loss.dtype == exact and gradient.dtype == case.dtype
    largest_log = 10 * case.scale / case.temperature
    rounding = 2 * torch.finfo(exact).eps * largest_log
    torch.testing.assert_close(loss.double().cpu(), wanted, rtol=8 * torch.finfo(exact).eps, atol=rounding)
    found, largest = gradient.double().cpu(), wanted_gradient.abs().max().item()
    relative = 2 * torch.finfo(case.dtype).eps  # once as the slope, once times the incoming gradient
    smallest = torch.finfo(case.dtype).tiny
    torch.testing.assert_close(
        found, wanted_gradient, rtol=relative, atol=rounding * max(largest, 0.1) + smallest
    )


SPREAD = replace(CASES[0], dtype=FP64, width=131, temperature=1.5)


def projections() -> tuple[torch.Tensor, ...]:
    """Return hidden states and weights of a projection, of student and teacher, and weights of tokens, in
    fp64.

    Shapes: [19, 12] and [131, 12] of the student, [19, 8] and [131, 8] of the teacher, [19].
    """
    generator = torch.Generator().manual_seed(4)
    shapes = ((19, 12), (131, 12), (19, 8), (131, 8), (19,))
    return tuple(torch.randn(*shape, dtype=FP64, generator=generator) for shape in shapes)


def fused_by_hand(direction: str, columns: int = 131, temperature: float = 1.5) -> tuple:
    """Return loss and gradients of the projection and the plain formula, for the first `columns` columns."""
    hidden, weight, other_hidden, other_weight, weights = projections()
    hidden.requires_grad_(), weight.requires_grad_()
    logits = ((hidden @ weight.T), (other_hidden @ other_weight.T))
    losses = PLAIN[direction](*(x[:, :columns] / temperature for x in logits))
    (losses * weights).sum().backward()
    return losses.detach(), (losses * weights).sum().detach(), hidden.grad, weight.grad
