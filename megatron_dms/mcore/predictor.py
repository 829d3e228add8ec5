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
    """Which entries of a rank's queries (or keys) carry decisions: the last channel of some heads.

    With a decision per head, that is the first query head of each group (or each key head); with one per
    layer, query head 0 (key head 0) of the whole layer, which tensor-parallel rank 0 holds.
    """

    def __init__(self, dms: DMSConfig, query_heads: int, groups: int, tp_rank: int) -> None:
        """query_heads, groups: H and G of this rank."""
        stride = query_heads // groups if dms.predictor == "query_channel" else 1
        if dms.granularity == "head":
            self.heads = [group * stride for group in range(groups)]
        else:
            self.heads = [0] if tp_rank == 0 else []
        self._read_stride = stride

    def read(self, x: Tensor) -> Tensor:
        """The raw values: x [T, B, heads, D] -> [T, B, G]. On a rank that carries none: to be overruled."""
        return x[:, :, :: self._read_stride, -1]

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """x [T, B, heads, D] with the borrowed entries multiplied by `factor`."""
        if not self.heads:
            return x
        mask = torch.ones(x.shape[-2:], dtype=x.dtype, device=x.device)
        mask[self.heads, -1] = factor
        return x * mask


def share_head_zero(raw: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Give every KV head the value of the layer's head 0 (granularity 'layer'). raw: [T, B, G].

    The backward pass adds up the gradients of all ranks on the one that holds head 0.
    """
    own = raw[..., :1].contiguous()
    first = all_gather_last_dim_from_tensor_parallel_region(own, group=tp_group)[..., :1]
    return first.expand_as(raw)
