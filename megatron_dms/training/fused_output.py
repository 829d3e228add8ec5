"""The distillation loss from hidden states: the output layers run inside the loss, a few tokens at a time.

Megatron's `output_processor` takes the place of the output layer on the last stage. modelopt runs the teacher
first and then the student, with the same arguments, so that one object sees both.
"""

from typing import Any

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.kernels.linear_kl import linear_kl
from megatron_dms.training.teacher import true_columns


class FusedDistillation:
    """The loss of one microbatch, called for the teacher and then for the student.

    The first call returns the hidden states, the second call the sum of the KL over the targets, in fp32.
    """

    def __init__(self, dms: DMSConfig, loss_mask: Tensor, vocab_size: int) -> None:
        """
        Args:
            loss_mask: [B, T], 1 for targets.
            vocab_size: the size of the true vocabulary, without padding.
        """
        self.dms = dms
        self.token_weights = loss_mask.T.flatten()  # hidden states are [T, B, ...]
        self.vocab_size = vocab_size
        self._teacher: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        config: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Take part in the forward pass, with the arguments of Megatron 0.19.2.

        hidden_states: [T, B, E], or a part of T under sequence parallelism.
        """
        if config.sequence_parallel:
            # linear_kl adds up the gradient over the ranks. Each rank then takes its part.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
            )
        rows = hidden_states.flatten(0, 1)
        weight = output_layer.weight if output_weight is None else output_weight
        if self._teacher is None:
            self._teacher = (rows, weight)
            return hidden_states
        group = output_layer.tp_group
        columns = true_columns(len(weight), self.vocab_size, group)
        total, _ = linear_kl(
            *(rows, weight, *self._teacher, self.token_weights),
            *(self.dms.kl, columns, self.dms.kl_temperature, group if group.size() > 1 else None),
        )
        return total
