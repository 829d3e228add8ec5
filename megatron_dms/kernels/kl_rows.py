"""Triton kernels of the distillation loss: one program reads the logits of student and teacher for one token.

The first kernel computes five sums of a row, which the ranks that share the vocabulary add up. The second
kernel, which finds most of the row in the cache, writes the gradient. Each kernel reads the logits once, so
that loss and gradient cost four reads and one write. tests/unit/kernels/test_kl.py (in Triton's interpreter)
and tests/gpu/test_kl_gpu.py compare them with ops/losses.py.

Shapes: N tokens, V columns of the vocabulary on this rank.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""The number of columns that a program holds at a time."""
LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Stands for -inf in a row that has seen no column yet, because -inf - -inf would be NaN."""


@triton.jit
def row_sums(
    student_ptr, teacher_ptr, sums_ptr, stride_s, stride_t, rows, columns, factor,
    TEACHER_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write [5, N] fp32: the peaks of student and teacher, their sums of exp(x - peak), and the sum of
    w (log w - log o) before normalisation. w is the distribution over which the loss averages, o the other.

    Args:
        factor: 1 / temperature.
        TEACHER_FIRST: whether w is the teacher's distribution.
    """
    row = tl.program_id(0).to(tl.int64)
    peak_s = tl.full([1], LOWEST, tl.float32)
    peak_t = tl.full([1], LOWEST, tl.float32)
    total_s = tl.zeros([1], tl.float32)
    total_t = tl.zeros([1], tl.float32)
    product = tl.zeros([1], tl.float32)
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        s = tl.load(student_ptr + row * stride_s + v, mask=v < columns, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + row * stride_t + v, mask=v < columns, other=float("-inf")).to(tl.float32)
        s *= factor
        t *= factor
        new_s = tl.maximum(peak_s, tl.max(s, 0))
        new_t = tl.maximum(peak_t, tl.max(t, 0))
        weight_s = tl.exp(s - new_s)
        weight_t = tl.exp(t - new_t)
        shrink_s = tl.exp(peak_s - new_s)
        shrink_t = tl.exp(peak_t - new_t)
        total_s = total_s * shrink_s + tl.sum(weight_s, 0)
        total_t = total_t * shrink_t + tl.sum(weight_t, 0)
        ahead = tl.where(v < columns, t - s, 0.0)
        if TEACHER_FIRST:
            product = product * shrink_t + tl.sum(weight_t * ahead, 0)
        else:
            product = product * shrink_s - tl.sum(weight_s * ahead, 0)
        peak_s = new_s
        peak_t = new_t
    one = tl.arange(0, 1)
    tl.store(sums_ptr + 0 * rows + row + one, peak_s)
    tl.store(sums_ptr + 1 * rows + row + one, peak_t)
    tl.store(sums_ptr + 2 * rows + row + one, total_s)
    tl.store(sums_ptr + 3 * rows + row + one, total_t)
    tl.store(sums_ptr + 4 * rows + row + one, product)


@triton.jit
def row_slopes(
    student_ptr, teacher_ptr, sums_ptr, loss_ptr, stride_s, stride_t, rows, columns, width, factor,
    TEACHER_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite the teacher's row with the gradient of the row's loss by the student's logits.

    Args:
        sums_ptr: the sums of `row_sums` over the whole vocabulary.
        loss_ptr: [N] fp32.
        width: V; the last V - columns entries get 0.
    """
    row = tl.program_id(0).to(tl.int64)
    peak_s = tl.load(sums_ptr + 0 * rows + row)
    peak_t = tl.load(sums_ptr + 1 * rows + row)
    log_s = tl.log(tl.load(sums_ptr + 2 * rows + row))
    log_t = tl.log(tl.load(sums_ptr + 3 * rows + row))
    loss = tl.load(loss_ptr + row)
    for start in range(0, width, BLOCK):
        v = start + tl.arange(0, BLOCK)
        s = tl.load(student_ptr + row * stride_s + v, mask=v < columns, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + row * stride_t + v, mask=v < columns, other=0.0).to(tl.float32)
        s = s * factor - peak_s - log_s
        t = t * factor - peak_t - log_t
        if TEACHER_FIRST:
            slope = tl.exp(s) - tl.exp(t)
        else:
            slope = tl.exp(s) * (s - t - loss)
        slope = tl.where(v < columns, slope * factor, 0.0)
        tl.store(teacher_ptr + row * stride_t + v, slope.to(teacher_ptr.dtype.element_ty), mask=v < width)


def kl_with_slope_triton(
    student_NV: Tensor,
    teacher_NV: Tensor,
    direction: str,
    columns: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    wants_slope: bool,
) -> Tensor:
    """kl.kl_with_slope for fp32, bf16 and fp16 on CUDA (elsewhere in Triton's interpreter)."""
    N, V = student_NV.shape
    sums = torch.empty(5, N, dtype=torch.float32, device=student_NV.device)
    rows = (student_NV, teacher_NV, sums)
    strides = (student_NV.stride(0), teacher_NV.stride(0), N, columns)
    teacher_first = direction == "teacher_student"
    options = {"TEACHER_FIRST": teacher_first, "BLOCK": BLOCK, "num_warps": 8}
    row_sums[(N,)](*rows, *strides, 1 / temperature, **options)
    if group is not None:
        _add_up(sums, teacher_first, group)
    peak_s, peak_t, total_s, total_t, product = sums
    # Each term is small by itself. Log-sum-exps would be large numbers that nearly cancel.
    if teacher_first:
        loss_N = product / total_t - (peak_t - peak_s) - total_t.log() + total_s.log()
    else:
        loss_N = product / total_s - (peak_s - peak_t) - total_s.log() + total_t.log()
    if wants_slope:
        row_slopes[(N,)](*rows, loss_N, *strides, V, 1 / temperature, **options)
    return loss_N


def _add_up(sums: Tensor, teacher_first: bool, group: dist.ProcessGroup) -> None:
    """Join the sums over the parts of a vocabulary that is spread over `group`, in place."""
    peaks = sums[:2].clone()
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=group)
    shrink = (sums[:2] - peaks).exp()
    sums[2:4] *= shrink
    sums[4] *= shrink[1 if teacher_first else 0]
    dist.all_reduce(sums[2:], group=group)
    sums[:2] = peaks
