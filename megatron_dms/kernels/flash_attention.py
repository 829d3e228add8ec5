"""DMS attention from two calls of torch's own flash attention, joined through their log-sum-exps.

The first call reads the window, without bias. The second call reads the older keys: shifted by window + 1
tokens, queries and keys are in plain causal attention again. Flash attention has no bias, but a score is a
sum over channels. So a few channels are added, in which a query has 1 and a key has its bias. (There are
several, because one channel in bf16 has 8 bits of the bias: each takes what the channels before it left.)
The borrowed channel cannot serve for this: with the query_channel predictor it is free in only one query head
of each group.

The cost follows the causal triangle, whatever has been evicted.

Shapes: B samples, H query heads, G KV heads, T tokens, D head size, O tokens of the second call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_dms.kernels.checks import check_inputs, with_wide_rows
from megatron_dms.kernels.flash_calls import causal, windowed

BIAS_CHANNELS = 3
"""The number of parts of the bias: 24 bits in bf16, 33 bits in fp16."""
ADDED_CHANNELS = 8
"""Flash attention on CUDA takes head sizes that are multiples of 8."""
LOWEST_BIAS = -2000.0
"""Stands for -inf, because -inf - -inf would be NaN; in nats. exp(-2000) is 0, and 2000 * sqrt(256) is finite
in fp16."""


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, window: int, scale: float | None = None
) -> Tensor:
    """`megatron_dms.ops.attention.dms_attention` in memory that grows with T, not with T * T.

    Args:
        q, k, v: on CUDA bf16 or fp16, with a head size that is a multiple of 8 up to 248; on CPU of any type
            and head size.
        log_keep: fp32.

    Raises:
        ValueError: shapes, types or devices that do not fit together; the message names them.
    """
    check_inputs(q, k, v, log_keep, window)
    D = q.shape[-1]
    if q.is_cuda and (q.dtype not in (torch.bfloat16, torch.float16) or D % 8 or D + ADDED_CHANNELS > 256):
        raise ValueError(
            f"q is {q.dtype} with head size {D}, the flash back-end takes bf16 and fp16 with multiples of 8 "
            f"up to {256 - ADDED_CHANNELS} on CUDA; use another --dms-attention-backend"
        )
    scale = D**-0.5 if scale is None else scale
    return _FlashAttention.apply(q, k, v, log_keep, window, scale)


class _FlashAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, window: int, scale: float
    ) -> Tensor:
        q, k, v = (with_wide_rows(x) for x in (q, k, v))
        near = windowed(q, k, v, scale, window)
        far, out, lse = None, near.out, near.lse
        old = q.shape[2] - window - 1  # O
        if old > 0:
            bias = log_keep[..., :old].clamp(min=LOWEST_BIAS) / scale
            far = causal(
                _with_ones(q[:, :, -old:]), _with_bias(k[:, :, :old], bias), _widened(v[:, :, :old]), scale
            )
            D = q.shape[-1]
            lse = lse.clone()
            lse[..., -old:] = torch.logaddexp(near.lse[..., -old:], far.lse)
            out = near.out * (near.lse - lse).exp()[..., None]
            out[:, :, -old:] += far.out[..., :D] * (far.lse - lse[..., -old:]).exp()[..., None]
            out = out.to(q.dtype)
        # The backward functions keep q, k and v alive, but not the outputs.
        ctx.backwards, ctx.old, ctx.scale = (near.backward, far and far.backward), old, scale
        ctx.save_for_backward(out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        near_backward, far_backward = ctx.backwards
        out, lse = ctx.saved_tensors
        grad = with_wide_rows(grad)
        old, D = ctx.old, out.shape[-1]
        dq, dk, dv = near_backward(grad, out, lse)
        B, G, T = dk.shape[:3]
        dlog_keep = torch.zeros(B, G, T, dtype=torch.float32, device=dk.device)
        if far_backward is not None:
            latest = slice(-old, None)
            far_dq, far_dk, far_dv = far_backward(
                _widened(grad[:, :, latest]), _widened(out[:, :, latest]), lse[..., latest].contiguous()
            )
            dq, dk, dv = dq.clone(), dk.clone(), dv.clone()
            dq[:, :, latest] += far_dq[..., :D]
            dk[:, :, :old] += far_dk[..., :D]
            dv[:, :, :old] += far_dv[..., :D]
            dlog_keep[..., :old] = far_dk[..., D] / ctx.scale  # the same in each of the bias's channels
        return dq, dk, dv, dlog_keep, None, None


def _widened(x: Tensor) -> Tensor:
    """[..., D + ADDED_CHANNELS], with zeros in the new channels."""
    return F.pad(x, (0, ADDED_CHANNELS))


def _with_ones(q: Tensor) -> Tensor:
    q = _widened(q)
    q[..., -ADDED_CHANNELS : BIAS_CHANNELS - ADDED_CHANNELS] = 1
    return q


def _with_bias(k: Tensor, bias: Tensor) -> Tensor:
    """bias: [B, G, O] in fp32."""
    D = k.shape[-1]
    k = _widened(k)
    for channel in range(D, D + BIAS_CHANNELS):
        k[..., channel] = bias.to(k.dtype)
        bias = bias - k[..., channel].to(bias.dtype)
    return k
