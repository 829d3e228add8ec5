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

from megatron_dms.config import DMSConfig
from megatron_dms.mcore.norms import RMSNorm


class LinearPredictor(MegatronModule):
    """raw = W . norm(x) on the residual stream x before the layer's input norm. W starts as zeros."""

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
        """Return [T, B, G] for hidden_states [T (or its sequence-parallel part), B, hidden]."""
        raw, _ = self.proj(self.norm(hidden_states))
        return raw


class BorrowedChannel:
    """The borrowed channel: the last one of the first query head of each group, or of each key head.

    With one decision per layer, the channels of all groups are borrowed as well, although only the first is
    read. NVIDIA's released code does the same, and no rank differs from another. If pairs are merged,
    decisions borrow the channel of the key and importances borrow the channel of the query.
    """

    def __init__(self, dms: DMSConfig, query_heads: int, groups: int) -> None:
        """query_heads, groups: H and G of this rank. The linear predictor borrows no channel."""
        self.predictor = dms.predictor
        self.of_query = dms.predictor == "query_channel" or dms.compression_method.borrows_query
        self.of_key = dms.predictor == "key_channel"
        self.stride = query_heads // groups

    def read(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the raw values of decisions, [T, B, G], from query [T, B, H, D] or key [T, B, G, D]."""
        return key[..., -1] if self.predictor == "key_channel" else self.read_query(query)

    def read_query(self, query: Tensor) -> Tensor:
        """Return the query's channel, [T, B, G], whether or not it is borrowed. query: [T, B, H, D]."""
        return query[:, :, :: self.stride, -1]

    def fade(self, query: Tensor, key: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Return query [T, B, H, D] and key [T, B, G, D], their borrowed channels multiplied by `factor`."""
        if self.of_query:
            query = _scale(query, factor, self.stride)
        if self.of_key:
            key = _scale(key, factor, 1)
        return query, key


def _scale(x: Tensor, factor: float, stride: int) -> Tensor:
    """Return x [T, B, heads, D] with the last channel of every stride-th head multiplied by `factor`."""
    mask = torch.ones(x.shape[-2:], dtype=x.dtype, device=x.device)
    mask[::stride, -1] = factor
    return x * mask


def share_head_zero(raw: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Give every KV head the value of the layer's head 0 (granularity 'layer'). raw: [T, B, G].

    The backward pass adds up the gradients of all ranks on the rank that holds head 0.
    """
    own = raw[..., :1].contiguous()
    first = all_gather_last_dim_from_tensor_parallel_region(own, group=tp_group)[..., :1]
    return first.expand_as(raw)
