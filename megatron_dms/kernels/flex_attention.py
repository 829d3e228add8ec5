"""DMS attention through torch's FlexAttention: the known baseline, which reads the whole causal triangle.

On CUDA it is compiled. Elsewhere torch runs it uncompiled, as dense products, and without a backward.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from megatron_dms.kernels.checks import check_inputs


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, window: int, scale: float | None = None
) -> Tensor:
    """`megatron_dms.ops.attention.dms_attention` as a score modification under a causal block mask.

    Raises:
        ValueError: shapes, types or devices that do not fit together; the message names them.
        NotImplementedError: raised by torch for gradients on CPU.
    """
    check_inputs(q, k, v, log_keep, window)
    T, group = q.shape[2], q.shape[1] // k.shape[1]

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i - j > window, score + log_keep[b, h // group, j], score)

    run: Callable[..., Any] = torch_flex_attention
    if q.is_cuda:
        run = _compiled()
    return run(
        q, k, v, score_mod=add_bias, block_mask=_causal_mask(T, q.device), scale=scale, enable_gqa=group > 1
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(torch_flex_attention, dynamic=False)


@functools.lru_cache(maxsize=4)
def _causal_mask(T: int, device: torch.device) -> Any:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
