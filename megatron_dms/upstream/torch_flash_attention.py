"""The operators behind F.scaled_dot_product_attention, whose own interface keeps the log-sum-exp to itself.

Shapes: B samples, H query heads, G KV heads, T tokens, D head size; lse [B, H, T] fp32, natural logarithm.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Call(NamedTuple):
    """One finished call and what its backward needs."""

    out: Tensor
    lse: Tensor
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(gradient of out, joined out, joined lse) -> gradients of q, k and v."""


def cuda_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Call:
    """Query i reads keys 0 to i, or i - window to i. q: [B, H, T, D]; k, v: [B, G, T, D]."""
    T = q.shape[2]
    rows = tuple(x.transpose(1, 2) for x in (q, k, v))  # [B, T, heads, D]
    options: dict[str, Any] = {"scale": scale}
    if window is not None:
        options |= {"window_size_left": window, "window_size_right": 0}
    out, lse, *random, _ = aten._flash_attention_forward(*rows, None, None, T, T, 0.0, True, False, **options)

    def backward(grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = aten._flash_attention_backward(
            grad.transpose(1, 2),
            *rows,
            out.transpose(1, 2),
            lse,
            None,
            None,
            T,
            T,
            0.0,
            True,
            *random,
            **options,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    return Call(out.transpose(1, 2), lse, backward)


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Call:
    """Causal where there is no mask. q: [B, H, T, D]; k, v: [B, G, S, D]; mask: fp, added to the scores."""
    options = {"attn_mask": mask, "scale": scale}
    is_causal = mask is None
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, **options)

    def backward(grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, is_causal, **options
        )

    return Call(out, lse, backward)
