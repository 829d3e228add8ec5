"""Attention of a plain GPT without Transformer Engine: torch's own, instead of T x T matrices of scores.

Megatron's local core attention makes these, which ends at a few thousand tokens; the teacher has to read as
many as the student.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class PlainCoreAttention(MegatronModule):
    """Causal attention; the other arguments of Megatron's constructor and forward are not needed for it."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(config)
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query [T, B, H, D], key and value [T, B, G, D] -> [T, B, H * D]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)
