"""Distillation loss over large vocabularies: loss and gradient in one go, without fp32 copies of the logits.

The gradient with respect to the student's logits is known as soon as the two softmaxes are. It takes the
place of the teacher's logits, which nobody reads again. Beyond the two tensors of logits almost no memory is
needed: a few numbers per token on CUDA (kl_rows.py), and fp32 copies of a few tokens elsewhere. The reference
is the KL of ops/losses.py, with which tests/unit/kernels/test_kl.py compares loss and gradient. Directions
are named by formula, as there.

Shapes: N tokens, V columns of the vocabulary on this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_dms.ops.losses import log_probabilities

DIRECTIONS = ("teacher_student", "student_teacher")
CHUNK_BYTES = 2**20
"""Size of one fp32 copy of a chunk's logits, which should stay in the processor's cache."""


def distillation_kl(
    student: Tensor,
    teacher: Tensor,
    direction: str,
    columns: int | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The KL of each token: ops.losses.kl_teacher_student or kl_student_teacher of logits / temperature.

    If a gradient is wanted, THE TEACHER'S LOGITS ARE OVERWRITTEN, and the loss can be differentiated once.

    Args:
        student, teacher: logits [..., V] of one type, contiguous. In fp16 the gradient is rounded before a
            loss scale reaches it, so small entries are lost.
        direction: one of DIRECTIONS.
        columns: the number of columns, of V, that belong to the vocabulary. The others are padding: they are
            never read and get the gradient 0. None: all columns.
        temperature: the logits are divided by it; the loss is not multiplied by its square.
        group: the tensor-parallel group that shares the vocabulary, with the same V on each rank; None if the
            vocabulary is whole.

    Returns:
        [...] fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the message names what was found and what was expected.
    """
    if student.shape != teacher.shape or student.dtype != teacher.dtype or student.device != teacher.device:
        raise ValueError(
            "expected student and teacher of one shape, type and device, found "
            f"{tuple(student.shape)} {student.dtype} on {student.device} and "
            f"{tuple(teacher.shape)} {teacher.dtype} on {teacher.device}"
        )
    if student.dim() < 2 or not student.shape[-1]:
        raise ValueError(f"expected logits [..., V], found {tuple(student.shape)}")
    if not teacher.is_contiguous() or not student.is_contiguous():
        raise ValueError("expected contiguous logits: the gradient takes the place of the teacher's")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}, expected one of {DIRECTIONS}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    columns = student.shape[-1] if columns is None else columns
    if not (torch.is_grad_enabled() and student.requires_grad):
        student = student.detach()  # no gradient is wanted, so nothing is overwritten
    return _DistillationKL.apply(student, teacher.detach(), direction, columns, temperature, group)


class _DistillationKL(Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        direction: str,
        columns: int,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        loss = kl_with_slope(
            student.detach().flatten(0, -2), teacher.flatten(0, -2), direction, columns, temperature, group,
            wants_gradient,
        )  # fmt: skip
        ctx.slope = teacher if wants_gradient else None
        return loss.view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, ctx.slope = ctx.slope, None
        if slope is None:
            raise RuntimeError("this loss was differentiated before: its gradient is made in place, once")
        return slope.mul_(grad[..., None]), None, None, None, None, None


def kl_with_slope(
    student_NV: Tensor,
    teacher_NV: Tensor,
    direction: str,
    columns: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    wants_slope: bool,
) -> Tensor:
    """[N] losses; with `wants_slope`, their gradients by the student's logits replace the teacher's logits.

    On CUDA, Triton kernels compute them (except in fp64), elsewhere plain torch does.
    """
    if student_NV.is_cuda and student_NV.dtype != torch.float64:
        from megatron_dms.kernels.kl_rows import kl_with_slope_triton  # triton is there where CUDA is

        with torch.cuda.device_of(student_NV):  # Triton launches on the current device
            return kl_with_slope_triton(
                student_NV, teacher_NV, direction, columns, temperature, group, wants_slope
            )
    exact = torch.promote_types(student_NV.dtype, torch.float32)
    loss_N = torch.empty(len(student_NV), dtype=exact, device=student_NV.device)
    # All ranks must take the same chunks: the width, unlike `columns`, is the same on all ranks.
    chunk = max(1, CHUNK_BYTES // (4 * student_NV.shape[1]))
    for start in range(0, len(student_NV), chunk):
        part = slice(start, start + chunk)
        logits = (x[part, :columns] for x in (student_NV, teacher_NV))
        if temperature != 1:
            logits = (x.to(exact) / temperature for x in logits)
        log_s, log_t = (log_probabilities(x, group) for x in logits)
        if direction == "teacher_student":
            p_t = log_t.exp()
            loss_N[part] = _sum_of_products(p_t, log_t.sub_(log_s), group)
            slope = log_s.exp_().sub_(p_t)
        else:
            p_s = log_s.exp()
            loss_N[part] = _sum_of_products(p_s, log_s.sub_(log_t), group)
            slope = log_s.sub_(loss_N[part, None]).mul_(p_s)
        if wants_slope:
            teacher_NV[part, :columns] = slope.div_(temperature)
            teacher_NV[part, columns:] = 0
    return loss_N


def _sum_of_products(x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = torch.linalg.vecdot(x, y)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total
