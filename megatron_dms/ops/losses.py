"""Distillation and compression losses (DMS paper, section 3), in plain torch.

`kl_teacher_student` and `kl_student_teacher` are the reference for the KL of kernels/kl.py and
kernels/linear_kl.py. The two directions are named by formula, never "forward" or "reverse". With a process
group, the last dimension of the logits is one rank's part of the vocabulary, and every rank gets the same
loss.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def kl_teacher_student(student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """KL(teacher || student) = sum_v p_t (log p_t - log p_s) per token.

    Args:
        student, teacher: logits [..., V], or this rank's part of them, without the columns that pad the
            vocabulary. No gradient reaches the teacher.
        group: the tensor-parallel group that shares the vocabulary; None if the vocabulary is whole.

    Returns:
        [...] fp32 at least.
    """
    return _VocabParallelKL.apply(student, teacher.detach(), group, True)


def kl_student_teacher(student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """KL(student || teacher) = sum_v p_s (log p_s - log p_t) per token; see kl_teacher_student."""
    return _VocabParallelKL.apply(student, teacher.detach(), group, False)


def compression_loss(mean_alpha: Tensor, target_fraction: float) -> Tensor:
    """One-sided l1: mean over samples of max(alpha* - mean_alpha_b, 0).

    Args:
        mean_alpha: [B], the mean of each sample's alpha over ALL layers, KV heads and tokens of the model.
            Clamping the mean of a part (of a stage, of a rank) would be a different loss.
        target_fraction: alpha*, in [0, 1).
    """
    return (target_fraction - mean_alpha).clamp(min=0).mean()


def log_probabilities(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log softmax over a vocabulary that may be spread over `group`: a new tensor, in fp32 at least."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if group is None:
        return torch.log_softmax(x, dim=-1)
    # A rank may hold nothing but padding, that is, no column of the true vocabulary.
    peak = x.amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_full((*x.shape[:-1], 1), float("-inf"))
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    x = x - peak
    total = x.exp().sum(dim=-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return x.sub_(total.log_())


class _VocabParallelKL(Function):
    """Per-token KL with its closed-form gradient; saves the logits, not their log-probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        group: dist.ProcessGroup | None,
        teacher_first: bool,
    ) -> Tensor:
        log_s, log_t = log_probabilities(student, group), log_probabilities(teacher, group)
        weight, ratio = (log_t, log_t - log_s) if teacher_first else (log_s, log_s - log_t)
        loss = (weight.exp() * ratio).sum(dim=-1)
        if group is not None:
            dist.all_reduce(loss, group=group)
        ctx.save_for_backward(student, teacher, loss)
        ctx.group, ctx.teacher_first = group, teacher_first
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, loss = ctx.saved_tensors
        log_s, log_t = log_probabilities(student, ctx.group), log_probabilities(teacher, ctx.group)
        if ctx.teacher_first:
            slope = log_s.exp() - log_t.exp()
        else:
            slope = log_s.exp() * (log_s - log_t - loss[..., None])
        return (slope * grad[..., None]).to(student.dtype), None, None, None
