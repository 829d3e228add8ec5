"""Output projection and distillation loss in one: the logits of student and teacher never exist as a whole.

A chunk of tokens is projected, its loss and gradient are computed (kl.py), and the gradient is carried back
to hidden states and weight at once, so each projection is computed only once. This requires the weight of
each token in the loss beforehand. tests/unit/kernels/test_kl.py compares loss and gradients with a projection
followed by the KL of ops/losses.py.

In addition to hidden states, weights and their gradients, the memory holds two chunks of logits, 3 % of a
whole tensor of logits, and, for half types, the weight's gradient in fp32.

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
"""The number of chunks of tokens: two chunks of logits are then 3 % of a whole tensor of logits."""
MIN_CHUNK = 128
"""The least tokens of a chunk: with fewer, the matrix products get slow."""
WEIGHT_ROWS = 8192
"""Rows of the weight's gradient that are computed at a time."""


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
    """The sum over tokens of token weight times KL, where logits are hidden @ weight.T / temperature.

    Args:
        student_NE, teacher_NF: the inputs of the two output layers, whole on every rank of `group`.
        student_weight_VE, teacher_weight_VF: this rank's rows of the output layers.
        token_weights_N: the weight of each token in the sum; it gets no gradient.
        direction, columns, temperature, group: as in kl.distillation_kl.

    Returns:
        The sum, a scalar in fp32 at least, with gradients to the student's hidden states (added up over
        `group`) and weight; and the KL of each token [N], without a gradient.

    Raises:
        ValueError: the message names what was found and what was expected.
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
            if d_student is not None:
                torch.mm(slope, student_weight, out=d_student[part])
            if d_weight is not None:
                for rows in range(0, len(d_weight), WEIGHT_ROWS):  # one product of all rows would double it
                    block = slice(rows, rows + WEIGHT_ROWS)
                    d_weight[block] += slope[:, block].T @ student[part]
        group = settings[-1]
        if d_student is not None and group is not None:
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
