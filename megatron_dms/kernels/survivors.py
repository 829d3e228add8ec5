"""The survivors: the keys that are worth reading beyond their window.

A key whose bias log(1 - alpha) is below a threshold has, outside the window, a softmax weight of at most
exp(threshold + score - largest score of the query). At the default threshold of -40, that is 4e-18 for a key
whose score equals the largest score. Even a key whose score is 20 above every score in the window stays below
the rounding of fp32, and so do its gradients.

Shapes: B samples, G KV heads, T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dms.config import THRESHOLD


class Survivors(NamedTuple):
    """The keys of each KV head, the surviving ones first."""

    order_BGT: Tensor
    """int32 positions: the survivors in ascending order, then the other keys in ascending order."""
    before_BGS: Tensor
    """[B, G, T + 1] int32: the number of survivors among the first t tokens."""


def find_survivors(log_keep_BGT: Tensor, threshold: float = THRESHOLD) -> Survivors:
    """Sort keys into survivors and others. The host does not wait for the device."""
    survives_BGT = ~(log_keep_BGT < threshold)  # a NaN survives, so that it is seen
    T = log_keep_BGT.shape[-1]
    upto_BGT = survives_BGT.cumsum(dim=-1)
    position_T = torch.arange(T, device=log_keep_BGT.device)
    rank_BGT = torch.where(survives_BGT, upto_BGT - 1, upto_BGT[..., -1:] + position_T - upto_BGT)
    order_BGT = torch.empty_like(rank_BGT, dtype=torch.int32)
    order_BGT.scatter_(-1, rank_BGT, position_T.int().expand_as(rank_BGT))
    return Survivors(order_BGT, torch.nn.functional.pad(upto_BGT, (1, 0)).int())
