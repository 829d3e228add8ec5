"""The flash attention that torch has, forward and backward: causal, and causal within a window.

Both functions return the log-sum-exp beside the output, and their backward takes the output and the
log-sum-exp as arguments. A caller that joins several calls into one softmax passes the joined output and
log-sum-exp, and gets the exact gradients of the whole.

Shapes: B samples, H query heads, G KV heads, T tokens, D head size; lse [B, H, T] fp32, natural logarithm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dms.upstream.torch_flash_attention import Call, cpu_attention, cuda_attention

MIN_BLOCK = 64
"""The least number of queries in a block of the windowed attention on CPU."""


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    """Query i reads keys 0 to i. q: [B, H, T, D]; k, v: [B, G, T, D]."""
    if q.is_cuda:
        return cuda_attention(q, k, v, scale, window=None)
    return cpu_attention(q, k, v, scale, mask=None)


def windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Call:
    """Query i reads keys i - window to i."""
    if window >= q.shape[2] - 1:
        return causal(q, k, v, scale)
    return cuda_attention(q, k, v, scale, window) if q.is_cuda else _cpu_in_blocks(q, k, v, scale, window)


def _cpu_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Call:
    """Blocks of S >= window queries become samples; each block reads its own S keys and the S keys before."""
    B, H, T, _ = q.shape
    S = max(window, MIN_BLOCK)
    blocks = -(-T // S)
    i, j = torch.arange(S)[:, None], torch.arange(-S, S)
    readable = (i >= j) & (i - j <= window)
    # The keys before the first block do not exist.
    readable = torch.stack([readable & (j >= 0)] + [readable] * (blocks - 1)).repeat(B, 1, 1)
    mask = torch.zeros(readable.shape, dtype=q.dtype).masked_fill_(~readable, float("-inf"))[:, None]

    def cut(x: Tensor) -> Tensor:  # [B, heads, T, D] -> [B * blocks, heads, S, D]
        padded = F.pad(x, (0, 0, 0, blocks * S - T))
        return padded.unflatten(2, (blocks, S)).transpose(1, 2).flatten(0, 1)

    def join(x: Tensor) -> Tensor:
        return x.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]

    def with_block_before(x: Tensor) -> Tensor:  # -> [B * blocks, heads, 2 S, D]
        own = cut(x).unflatten(0, (B, blocks))
        before = F.pad(own, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat([before, own], dim=3).flatten(0, 1)

    def add_blocks(
        x: Tensor,
    ) -> Tensor:  # the transpose of with_block_before: [B * blocks, heads, 2 S, D] -> [B, heads, T, D]
        before, own = x.unflatten(0, (B, blocks)).chunk(2, dim=3)
        own = own + F.pad(before, (0, 0, 0, 0, 0, 0, 0, 1))[:, 1:]
        return join(own.flatten(0, 1))

    call = cpu_attention(cut(q), with_block_before(k), with_block_before(v), scale, mask)

    def backward(grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = call.backward(cut(grad), cut(out), cut(lse[..., None])[..., 0])
        return join(dq), add_blocks(dk), add_blocks(dv)

    return Call(join(call.out), join(call.lse[..., None])[..., 0], backward)
