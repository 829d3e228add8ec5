"""Student and teacher as one model, through nvidia-modelopt (upstream/modelopt_distillation.py).

This module holds what modelopt does not have: a KL that leaves out vocabulary padding and keeps no fp32
copies of the logits, and a teacher that shares the student's tensors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dms.config import DMSConfig
from megatron_dms.kernels.kl import distillation_kl
from megatron_dms.upstream.modelopt_distillation import DistillationLoss, distillation_model


class TokenKL(DistillationLoss):
    """The KL per token, [B, T], between vocabulary-parallel logits, [T, B, V / TP] each.

    Columns beyond the true vocabulary are left out, as their number depends on the layout.
    """

    def __init__(self, dms: DMSConfig, vocab_size: int, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.dms = dms
        self.vocab_size = vocab_size
        self.tp_group = tp_group

    def forward(self, student: tuple[Tensor, Any], teacher: tuple[Tensor, Any]) -> Tensor:
        """Return the KL. Both arguments are (logits, bias), as Megatron's output layer returns them. In
        training, the teacher's logits are overwritten."""
        own = true_columns(student[0].shape[-1], self.vocab_size, self.tp_group)
        group = self.tp_group if self.tp_group.size() > 1 else None
        kl = distillation_kl(student[0], teacher[0], self.dms.kl, own, self.dms.kl_temperature, group)
        return kl.transpose(0, 1)


def true_columns(columns: int, vocab_size: int, tp_group: ProcessGroup) -> int:
    """Return how many of this rank's V / TP columns belong to the true vocabulary. The others are padding."""
    first, _ = VocabUtility.vocab_range_from_per_partition_vocab_size(
        columns, tp_group.rank(), tp_group.size()
    )
    return min(max(vocab_size - first, 0), columns)


def distill(student: GPTModel, teacher: GPTModel, dms: DMSConfig, vocab_size: int) -> GPTModel:
    """Turn the student into modelopt's DistillationModel with this teacher, in place.

    Args:
        dms: the settings, for direction and temperature of the loss.
        vocab_size: the size of the true vocabulary, without padding.
    """
    loss = TokenKL(dms, vocab_size, student.pg_collection.tp) if student.post_process else None
    model = distillation_model(student, teacher, loss)
    model.compute_language_model_loss = partial(
        _validation_cross_entropy, model, model.compute_language_model_loss, vocab_size
    )
    # The teacher is a plain model, which cannot read the record of a microbatch (mcore/microbatch.py).
    teacher.register_forward_pre_hook(_without_microbatch, with_kwargs=True)
    return model


def _validation_cross_entropy(
    model: GPTModel, cross_entropy: Callable[..., Tensor], vocab_size: int, labels: Tensor, logits: Tensor
) -> Tensor:
    """Return Megatron's cross entropy [B, T] over the true vocabulary; in training modelopt's, which is zero.

    Megatron's function counts the columns that pad the vocabulary, whose number depends on the layout. It
    also overwrites its logits, which the distillation loss has yet to read.
    """
    if not model.training:
        logits = logits.clone()
        own = true_columns(logits.shape[-1], vocab_size, model.pg_collection.tp)
        logits[..., own:] = torch.finfo(logits.dtype).min
    return cross_entropy(labels, logits)


def _without_microbatch(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "packed_seq_params": None}


def share_parameters(teacher: torch.nn.Module, student: torch.nn.Module) -> None:
    """Replace the teacher's parameters by the student's own tensors. The teacher is then the student without
    eviction.

    Args:
        teacher: a model whose parameters the student has under the same names.

    Raises:
        ValueError: the student lacks one of these parameters.
    """
    own = dict(student.named_parameters())
    for name, _ in list(teacher.named_parameters()):
        if name not in own:
            raise ValueError(f"the student has no parameter {name} that the teacher could share")
        holder, _, leaf = name.rpartition(".")
        setattr(teacher.get_submodule(holder), leaf, own[name])
