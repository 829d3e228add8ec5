"""Norms for machines without Transformer Engine, under the parameter names that Transformer Engine uses."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may be used under sequence parallelism (Megatron's torch norm refuses it).

    There each rank sees its part of the tokens only; the attribute `sequence_parallel` makes Megatron add up
    the weight's gradients over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and column-parallel linear in one module, as Transformer Engine has it.

    With it in the place of a separate input norm, attention receives the residual stream before the norm, as
    the linear predictor needs it, and the checkpoints of both layer specs have the same names.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, config=config, init_method=init_method, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """input_: [T (or its sequence-parallel part), B, hidden], before the norm."""
        eps = self.config.layernorm_epsilon
        return super().forward(
            F.rms_norm(input_, (self.input_size,), self.layer_norm_weight, eps), *args, **kwargs
        )
