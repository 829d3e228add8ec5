"""Output projection and distillation loss in one: the logits of student and teacher never exist as a whole.

A chunk of tokens is projected, its loss and gradient are taken (kl.py), and the gradient is carried back to
hidden states and weight at once, so the projection is computed once. This needs the weight of each token in
the loss beforehand.

Beyond hidden states, weights and their gradients there are two chunks of logits, 3 % of a whole tensor of
them, and, for half types, the weight's gradient in fp32.

Shapes: N tokens, V columns of the vocabulary on this rank, E hidden size of the student, F of the teacher.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_dms.kernels.kl import DIRECTIONS, kl_with_slope

CHUNKS = 64
"""Tokens are taken in so many chunks: two of logits are then 3 % of one whole tensor of logits."""
MIN_CHUNK = 128
"""Tokens of a chunk, at least: below, the products get slow."""
WEIGHT_ROWS = 8192
"""Of the weight's gradient, at a time."""


def linear_kl(
    student_NE: Tensor,
    student_weight_VE: Tensor,
    teacher_NF: Tensor,
    teacher_weight_VF: Tensor,
    token_weights_N: Tensor,
    direction: str,
    columns: int | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of weight times KL between softmax(hidden @ weight.T / temperature).

    Args:
        student_NE, teacher_NF: what goes into the two output layers, whole on every rank of `group`.
        student_weight_VE, teacher_weight_VF: this rank's rows of the output layers.
        token_weights_N: without gradient.
        direction, columns, temperature, group: as in kl.distillation_kl.

    Returns:
        The sum, a scalar in fp32 at least, with gradients to the student's hidden states (added up over
        `group`) and weight; and the KL of each token [N], without any.

    Raises:
        ValueError: names what was found and what was expected.
    """
    N = len(student_NE)
    found = [
        tuple(x.shape)
        for x in (student_NE, student_weight_VE, teacher_NF, teacher_weight_VF, token_weights_N)
    ]
    V, E, F = len(student_weight_VE), student_NE.shape[-1], teacher_NF.shape[-1]
    if found != [(N, E), (V, E), (N, F), (V, F), (N,)]:
        raise ValueError(f"expected shapes [N,E], [V,E], [N,F], [V,F] and [N], found {found}")
    if len({x.dtype for x in (student_NE, student_weight_VE, teacher_NF, teacher_weight_VF)}) > 1:
        raise ValueError("expected hidden states and weights of one type")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}, expected one of {DIRECTIONS}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    settings = (direction, V if columns is None else columns, temperature, group)
    return _LinearKL.apply(
        student_NE,
        student_weight_VE,
        teacher_NF.detach(),
        teacher_weight_VF.detach(),
        token_weights_N,
        settings,
    )


class _LinearKL(Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        token_weights: Tensor,
        settings: tuple[str, int, float, dist.ProcessGroup | None],
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(student.dtype, torch.float32)
        N = len(student)
        kl_N = torch.empty(N, dtype=exact, device=student.device)
        d_student = torch.empty_like(student) if wants_hidden else None
        d_weight = torch.zeros_like(student_weight, dtype=exact) if wants_weight else None
        chunk = max(MIN_CHUNK, -(-N // CHUNKS))
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            logits = student[part] @ student_weight.T
            slope = teacher[part] @ teacher_weight.T
            kl_N[part] = kl_with_slope(logits, slope, *settings, wants_slope=wants_hidden or wants_weight)
            del logits
            slope *= token_weights[part, None].to(slope.dtype)
            if wants_hidden:
                torch.mm(slope, student_weight, out=d_student[part])
            if wants_weight:
                for rows in range(0, len(d_weight), WEIGHT_ROWS):  # a product of all would be a second one
                    block = slice(rows, rows + WEIGHT_ROWS)
                    d_weight[block] += slope[:, block].T @ student[part]
        group = settings[-1]
        if wants_hidden and group is not None:
            dist.all_reduce(d_student, group=group)
        ctx.gradients = (d_student, None if d_weight is None else d_weight.to(student_weight.dtype))
        ctx.mark_non_differentiable(kl_N)
        return (kl_N * token_weights).sum(), kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, (None, None)
        if gradients == (None, None):
            raise RuntimeError("this loss was differentiated before: its gradients are made in place, once")
        return *(None if x is None else x.mul_(grad) for x in gradients), None, None, None, None
