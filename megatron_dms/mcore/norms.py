"""Norms for machines without Transformer Engine, with Transformer Engine's parameter names."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism, which Megatron's torch norm refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark_sequence_parallel(self.weight, config)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and column-parallel linear layer in one module, as in Transformer Engine.

    It takes the place of a separate input norm. So attention receives the residual stream before the norm,
    which the linear predictor needs, and the checkpoints of both layer specs have the same names.
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
        _mark_sequence_parallel(self.layer_norm_weight, config)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output and its bias. input_: [T (or its sequence-parallel part), B, hidden],
        before the norm."""
        eps = self.config.layernorm_epsilon
        return super().forward(
            F.rms_norm(input_, (self.input_size,), self.layer_norm_weight, eps), *args, **kwargs
        )


def _mark_sequence_parallel(weight: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Let Megatron add up the weight's gradients over the tensor-parallel group under sequence parallelism.

    Each rank then sees only its part of the tokens.
    """
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's
