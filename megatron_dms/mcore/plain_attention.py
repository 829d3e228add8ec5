"""The attention of a plain GPT without Transformer Engine: torch's attention, without T x T score matrices.

Megatron's local core attention computes such matrices, which limits it to a few thousand tokens, and does not
support context parallelism. The teacher has to read as many tokens as the student, in every layout.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dms.mcore.context_parallel import HeadExchange
from megatron_dms.ops.attention import dms_attention


class PlainCoreAttention(MegatronModule):
    """Causal attention. It ignores the other arguments of Megatron's constructor and forward.

    score_matrix: whether to use the dense reference, which rounds as the student's dense back-end does.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        score_matrix: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale
        self.score_matrix = score_matrix
        self.exchange = HeadExchange(pg_collection.cp, config.num_query_groups // pg_collection.tp.size())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [T, B, H * D] for query [T, B, H, D], key and value [T, B, G, D]."""
        query, key, value = self.exchange.to_whole_sequence(query, key, value)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.score_matrix:
            nothing = k.new_zeros(k.shape[:3])  # is evicted
            out = dms_attention(q, k, v, nothing, window=0, scale=self.scale)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
        return self.exchange.to_own_tokens(out.permute(2, 0, 1, 3)).flatten(2)
