"""From eviction logits to soft and hard decisions (DMS paper, section 3; arXiv 2506.05345).

Shapes: B samples, G KV heads, T tokens. alpha = 1 means "evict this key-value pair once it leaves the
window".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Constants of splitmix64 (Steele, Lea, Flood, 2014), written as signed 64-bit integers because torch has no
# unsigned multiplication. In two's complement arithmetic the products have the same bits.
_GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MANTISSA_BITS = 52  # one less than fp64 has: (bits + 1/2) / 2^52 is then exact, and never 0 or 1


class Eviction(NamedTuple):
    """The decisions of one layer, each [B, G, T] fp32."""

    alpha: Tensor
    """Probability-like decision: the relaxed sigmoid in training, 0 or 1 in evaluation."""
    hard: Tensor
    """1[alpha > 1/2], in training with the gradient of alpha (straight-through estimator)."""
    log_keep: Tensor
    """log(1 - alpha), the additive score bias outside the window."""


def soft_eviction(logits: Tensor, noise: Tensor, temperature: float) -> Eviction:
    """Relaxed decisions for training: alpha = sigmoid((z + noise) / temperature).

    log(1 - alpha) is computed as logsigmoid(-s), which stays finite and keeps its gradient where 1 - alpha
    underflows.

    Args:
        logits: z, [B, G, T].
        noise: logistic noise, broadcastable to [B, G, T].
        temperature: tau > 0, in units of the logits.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    scores = (logits.float() + noise) / temperature
    alpha = torch.sigmoid(scores)
    hard = (alpha > 0.5).float() + (alpha - alpha.detach())
    return Eviction(alpha, hard, F.logsigmoid(-scores))


def hard_eviction(logits: Tensor) -> Eviction:
    """Hard decisions for evaluation and inference: alpha = 1[z > 0], without noise. logits: [B, G, T]."""
    alpha = (logits.float() > 0).float()
    log_keep = torch.zeros_like(alpha).masked_fill_(alpha.bool(), float("-inf"))
    return Eviction(alpha, alpha, log_keep)


def shift(x: Tensor, lag: int, fill: float = 0.0) -> Tensor:
    """Give pair j what token j + lag decided: out[..., j] = x[..., j + lag].

    The last `lag` pairs have no decision yet and get `fill` (0 means kept, for alpha and for log_keep).

    Args:
        x: [..., T].
        lag: >= 0, in tokens; lag = window is the paper's "immediate eviction" ablation.
    """
    if lag < 0:
        raise ValueError(f"lag is {lag}, expected >= 0")
    if lag == 0:
        return x
    return F.pad(x[..., lag:], (0, min(lag, x.shape[-1])), value=fill)


def logistic_noise(seed: int, sample_ids: Tensor, layer: int, heads: Tensor, tokens: Tensor) -> Tensor:
    """Logistic noise (the difference of two Gumbel variables) as a pure function of global ids.

    No random state is read or written, so neither the layout of ranks, nor microbatching, nor recomputation,
    nor a resume can change a value.

    Args:
        seed: the run's seed.
        sample_ids: [B] int64, global number of the sample in the run.
        layer: global layer number.
        heads: [G] int64, global KV head numbers.
        tokens: [T] int64, positions in the sample.

    Returns:
        [B, G, T] fp32.
    """
    state = _mix(torch.full_like(sample_ids, seed, dtype=torch.int64))
    state = _mix(state ^ sample_ids)  # [B]
    state = _mix(state ^ layer)
    state = _mix(state[:, None] ^ heads[None, :])  # [B, G]
    state = _mix(state[:, :, None] ^ tokens[None, None, :])  # [B, G, T]
    bits = _logical_right_shift(state, 64 - _MANTISSA_BITS)
    uniform = (bits.double() + 0.5) * 2.0**-_MANTISSA_BITS  # in (0, 1), never an end point
    return (torch.log(uniform) - torch.log1p(-uniform)).float()


def _logical_right_shift(x: Tensor, bits: int) -> Tensor:
    """Right shift of int64 that fills with zeros (torch's >> repeats the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """One splitmix64 step: a bijection of int64 in which each input bit reaches every output bit."""
    x = x + _GOLDEN_GAMMA
    x = (x ^ _logical_right_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_right_shift(x, 27)) * _MIX_2
    return x ^ _logical_right_shift(x, 31)
