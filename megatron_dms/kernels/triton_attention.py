"""DMS attention in Triton, whose cost follows the window and the keys that survive.

The kernels are in triton_forward.py and triton_backward.py. Without a GPU they run, slowly, in Triton's
interpreter: set TRITON_INTERPRET=1 before this module is imported.

Shapes: B samples, H query heads, G KV heads, T tokens, D head size.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_dms.kernels.checks import check_inputs, with_wide_rows
from megatron_dms.kernels.survivors import THRESHOLD, Survivors, find_survivors
from megatron_dms.kernels.triton_backward import key_gradients, query_gradients, query_sums
from megatron_dms.kernels.triton_forward import attend_queries, pack_survivors

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_HEAD_SIZE = 256
INTERPRETED = not isinstance(attend_queries, triton.JITFunction)
LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """The block sizes and launch options of a kernel."""

    M: int
    """Queries in a block."""
    N: int
    """Keys in a block."""
    num_warps: int
    num_stages: int


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    window: int,
    scale: float | None = None,
    threshold: float = THRESHOLD,
) -> Tensor:
    """`megatron_dms.ops.attention.dms_attention`, but keys with log_keep < threshold end with their window.

    Products take factors in the type of the inputs and sum in fp32 (fp32 inputs exactly, without TF32).
    The result is deterministic: outputs and gradients are the same in every bit each time.

    Args:
        q, k, v: all in fp32, bf16 or fp16; channels contiguous, D up to 256.
        log_keep: fp32.
        threshold: in nats; see survivors.py.

    Raises:
        ValueError: shapes, types or devices that the kernels cannot take; the message names them.
    """
    check_inputs(q, k, v, log_keep, window)
    if q.dtype not in DTYPES or q.shape[-1] > MAX_HEAD_SIZE:
        raise ValueError(
            f"q is {q.dtype} with head size {q.shape[-1]}, the triton back-end takes "
            f"{', '.join(map(str, DTYPES))} with head sizes up to {MAX_HEAD_SIZE}"
        )
    if not q.is_cuda and not INTERPRETED:
        raise ValueError(
            f"q is on {q.device}, the triton back-end needs CUDA; use --dms-attention-backend dense or flash"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = min(window, q.shape[2])  # positions plus window must be a number of 32 bits
    with torch.cuda.device_of(q):  # Triton launches on the current device; autograd sets it in the backward
        return _TritonAttention.apply(q, k, v, log_keep.contiguous(), window, scale, threshold)


class _TritonAttention(Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, log_keep, window: int, scale: float, threshold: float) -> Tensor:
        q, k, v = (with_wide_rows(x) for x in (q, k, v))
        survivors = find_survivors(log_keep, threshold)
        B, H, T, D = q.shape
        kept_k, kept_v, bias = _packed(k, v, log_keep, survivors)
        out = torch.empty_like(q)  # in the memory layout of q, which is how Megatron wants it back
        lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        blocks = forward_blocks(D, q.dtype)
        attend_queries[(triton.cdiv(T, blocks.M), B * H)](
            q, k, v, kept_k, kept_v, survivors.order_BGT, bias, survivors.before_BGS, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            T, window, scale * LOG2_E, **_constants(q, k), **blocks._asdict(),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, log_keep, out, lse, *survivors)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_keep, out, lse, order, before = ctx.saved_tensors
        grad = with_wide_rows(grad)
        B, H, T, D = q.shape
        G = k.shape[1]
        constants = _constants(q, k)
        delta = torch.empty_like(lse)
        query_sums[(triton.cdiv(T, 64), B * H)](
            out, grad, delta, *out.stride()[:3], *grad.stride()[:3], T, H=H, D=D, DP=constants["DP"], M=64
        )
        kept_k, kept_v, bias = _packed(k, v, log_keep, Survivors(order, before))
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
        factors = (T, ctx.window, ctx.scale * LOG2_E, ctx.scale)
        dq = torch.empty_like(q)
        blocks = query_blocks(D, q.dtype)
        query_gradients[(triton.cdiv(T, blocks.M), B * H)](
            q, k, v, kept_k, kept_v, order, bias, before, lse, grad, delta, dq,
            *strides, *dq.stride()[:3], *factors, **constants, **blocks._asdict(),
        )  # fmt: skip
        del kept_k, kept_v
        dk, dv, dlog_keep = torch.empty_like(k), torch.empty_like(v), torch.empty_like(log_keep)
        blocks = key_blocks(D, q.dtype)
        # One block more, as survivors and others may both end with a block that is not full.
        key_gradients[(triton.cdiv(T, blocks.N) + 1, B * G)](
            q, k, v, order, log_keep, before, lse, grad, delta, dk, dv, dlog_keep,
            *strides, *dk.stride()[:3], *dv.stride()[:3], *factors, LOG2_E, **constants, **blocks._asdict(),
        )  # fmt: skip
        return dq, dk, dv, dlog_keep, None, None, None


def _packed(k: Tensor, v: Tensor, log_keep: Tensor, survivors: Survivors) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and biases (times log2 e) of the survivors, side by side; the rest is uninitialised."""
    B, G, T, D = k.shape
    kept_k, kept_v = k.new_empty(B, G, T, D), v.new_empty(B, G, T, D)
    bias = torch.empty_like(log_keep)
    rows = 64
    pack_survivors[(triton.cdiv(T, rows), B * G)](
        k, v, log_keep, *survivors, kept_k, kept_v, bias, *k.stride()[:3], *v.stride()[:3], T, LOG2_E,
        G=G, D=D, DP=padded(D), N=rows,
    )  # fmt: skip
    return kept_k, kept_v, bias


def _constants(q: Tensor, k: Tensor) -> dict[str, Any]:
    # Triton's interpreter multiplies the bits of bf16 as integers; in fp32 the products are the same.
    dot = tl.float32 if INTERPRETED else DTYPES[q.dtype]
    return {"H": q.shape[1], "G": k.shape[1], "D": q.shape[3], "DP": padded(q.shape[3]), "DOT": dot}


def padded(D: int) -> int:
    """The number of channels of a block: a power of two, as Triton requires."""
    return max(16, triton.next_power_of_2(D))


def forward_blocks(D: int, dtype: torch.dtype) -> Blocks:
    """Blocks of `attend_queries`."""
    if dtype == torch.float32:
        return Blocks(M=64, N=32, num_warps=4, num_stages=1)
    if D > 128:
        return Blocks(M=128, N=32, num_warps=8, num_stages=2)
    return Blocks(M=128, N=64, num_warps=8 if D > 64 else 4, num_stages=3)


def query_blocks(D: int, dtype: torch.dtype) -> Blocks:
    """Blocks of `query_gradients`."""
    if dtype == torch.float32:
        return Blocks(M=32, N=32, num_warps=4, num_stages=1)
    if D > 128:
        return Blocks(M=64, N=32, num_warps=8, num_stages=2)
    return Blocks(M=128, N=64, num_warps=8, num_stages=2)


def key_blocks(D: int, dtype: torch.dtype) -> Blocks:
    """Blocks of `key_gradients`."""
    if dtype == torch.float32:
        return Blocks(M=32, N=32, num_warps=4, num_stages=1)
    if D > 128:
        return Blocks(M=32, N=32, num_warps=8, num_stages=2)
    return Blocks(M=32, N=128, num_warps=8, num_stages=2)
