"""Where the eviction logit comes from: a borrowed channel of the queries or keys, or a linear layer.

Shapes: T tokens, B samples, H query heads and G KV heads of this tensor-parallel rank, D head size.
"""

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    all_gather_last_dim_from_tensor_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dms.mcore.norms import RMSNorm


class LinearPredictor(MegatronModule):
    """raw = W . norm(x) on the residual stream before the layer's input norm; W starts at 0."""

    def __init__(self, config: TransformerConfig, tp_group: ProcessGroup) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.proj = ColumnParallelLinear(
            config.hidden_size,
            config.num_query_groups,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=config.add_bias_linear or config.add_qkv_bias,
            tp_group=tp_group,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [T (or its sequence-parallel part), B, hidden] -> [T, B, G]."""
        raw, _ = self.proj(self.norm(hidden_states))
        return raw


class BorrowedChannel:
    """The last channel of the first query head of each group (or of each key head), lent to decisions.

    With one decision per layer all of them are lent as well, though only the first is read: so does NVIDIA's
    released code, and no rank differs from another.
    """

    def __init__(self, predictor: str, query_heads: int, groups: int) -> None:
        """predictor: of DMSConfig ("linear" borrows nothing); query_heads, groups: H and G of this rank."""
        self.predictor = predictor
        self.stride = query_heads // groups if predictor == "query_channel" else 1

    def read(self, query: Tensor, key: Tensor) -> Tensor:
        """The raw values, of query [T, B, H, D] or key [T, B, G, D]: -> [T, B, G]."""
        lender = query if self.predictor == "query_channel" else key
        return lender[:, :, :: self.stride, -1]

    def fade(self, query: Tensor, key: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Query [T, B, H, D] and key [T, B, G, D] with the borrowed entries multiplied by `factor`."""
        if self.predictor == "query_channel":
            return self._scale(query, factor), key
        if self.predictor == "key_channel":
            return query, self._scale(key, factor)
        return query, key

    def _scale(self, x: Tensor, factor: float) -> Tensor:
        mask = torch.ones(x.shape[-2:], dtype=x.dtype, device=x.device)
        mask[:: self.stride, -1] = factor
        return x * mask


def share_head_zero(raw: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Give every KV head the value of the layer's head 0 (granularity 'layer'). raw: [T, B, G].

    The backward pass adds up the gradients of all ranks on the one that holds head 0.
    """
    own = raw[..., :1].contiguous()
    first = all_gather_last_dim_from_tensor_parallel_region(own, group=tp_group)[..., :1]
    return first.expand_as(raw)
