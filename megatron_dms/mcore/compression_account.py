"""The compression account of one microbatch: the compression loss, exact under any layout of ranks.

The compression loss clamps each sample's mean alpha over the WHOLE model (DMS paper, section 3), but a rank
sees only its own layers and KV heads. The gradient of the loss is simple: -weight / (B L G T) for each alpha
of a sample whose mean is below the target, and 0 for all others. So each rank adds up its decisions in the
forward pass. When its last layer has reported, the rank starts an all-reduce of these sums over the ranks of
the model. In the backward pass, each alpha waits for the all-reduce and then takes its gradient. Every stage,
also a virtual one, runs the forward pass of a microbatch before any stage runs the backward pass. So this
cannot deadlock in any pipeline schedule, and the result is the result of one process.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class ModelShape:
    """The counts over which decisions are averaged, and this rank's share of the model."""

    layers: int
    """L, the layers of the whole model."""
    groups: int
    """G, the KV heads of a layer, over all ranks."""
    local_layers: int
    """The layers of this rank, over all its virtual stages."""
    ranks: dist.ProcessGroup | None
    """A gloo group of the ranks that hold one copy of the model (TP x CP x PP); None for a single process.
    The group is not NCCL's: Megatron synchronises the whole device between a stage's forward pass and its
    send, and an NCCL all-reduce that waits for the next stage's forward pass would then wait for ever."""


@dataclass
class CompressionAccount:
    """The sums of the decisions of one microbatch, which has B samples.

    Attributes:
        shape: the counts of the model.
        target: alpha*, the evicted fraction that the schedule asks for.
        tokens: [B] fp32, the number of valid tokens of each sample.
        loss_weight: the factor on the compression loss in the gradient, before the mean over samples. It
            holds everything that Megatron applies to the main loss on its way (loss scale, 1 / microbatches).
    """

    shape: ModelShape
    target: float
    tokens: Tensor
    loss_weight: float | Tensor
    _reported: set[int] = field(default_factory=set)
    _sums: Tensor | None = None
    _pending: dist.Work | None = None

    def report(self, layer: int, heads: Tensor, alpha: Tensor, hard: Tensor, valid: Tensor) -> None:
        """Add the decisions of one layer. A layer that reports again (recomputation) is counted once.

        Args:
            layer: the global layer number, from 0.
            heads: [g], the global numbers of this rank's KV heads.
            alpha, hard: [B, g, T], soft and hard decisions.
            valid: [B, T] bool. All False if another rank reports the same decisions.
        """
        if layer in self._reported:
            return
        B, L, G = len(self.tokens), self.shape.layers, self.shape.groups
        if self._sums is None:
            self._sums = torch.zeros(2 * B + L * G, device=alpha.device)
        with torch.no_grad():
            mask = valid[:, None].float()
            evicted = hard * mask  # [B, g, T]
            self._sums[:B] += (alpha * mask).sum(dim=(1, 2))
            self._sums[B : 2 * B] += evicted.sum(dim=(1, 2))
            self._sums[2 * B :].view(L, G)[layer, heads] += evicted.sum(dim=(0, 2))
        self._reported.add(layer)
        if len(self._reported) == self.shape.local_layers and self.shape.ranks is not None:
            self._sums = self._sums.cpu()
            self._pending = dist.all_reduce(self._sums, group=self.shape.ranks, async_op=True)

    def _totals(self) -> Tensor:
        if self._sums is None or len(self._reported) != self.shape.local_layers:
            raise RuntimeError(
                f"{len(self._reported)} of {self.shape.local_layers} layers of this rank have reported"
            )
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._sums = self._sums.to(self.tokens.device)
        return self._sums

    def mean_alpha(self, hard: bool) -> Tensor:
        """Return [B], the mean decision of each sample over all layers, KV heads and valid tokens."""
        B = len(self.tokens)
        sums = self._totals()[B : 2 * B] if hard else self._totals()[:B]
        return sums / (self.tokens * self.shape.layers * self.shape.groups)

    def evicted_per_head(self) -> Tensor:
        """Return [L, G], the evicted tokens of each layer and KV head, summed over the samples."""
        return self._totals()[2 * len(self.tokens) :].view(self.shape.layers, self.shape.groups)

    def gradient(self) -> Tensor:
        """Return [B], d loss / d alpha, which is the same for each alpha of a sample."""
        below = (self.mean_alpha(hard=True) < self.target).float()
        count = self.tokens * self.shape.layers * self.shape.groups
        return -self.loss_weight * below / (len(self.tokens) * count)


def attach_compression_loss(
    log_keep: Tensor, alpha: Tensor, valid: Tensor, account: CompressionAccount
) -> Tensor:
    """Return log_keep unchanged. In the backward pass, alpha receives the gradient of the compression loss.

    Args:
        log_keep, alpha: [B, G, T], functions of the same logits.
        valid: [B, T] bool. Padding receives no gradient.
        account: the account of the microbatch.
    """
    return _AttachCompressionLoss.apply(log_keep, alpha, valid, account)


class _Context(FunctionCtx):
    account: CompressionAccount
    saved_tensors: tuple[Tensor, ...]


class _AttachCompressionLoss(Function):
    @staticmethod
    def forward(
        ctx: _Context, log_keep: Tensor, alpha: Tensor, valid: Tensor, account: CompressionAccount
    ) -> Tensor:
        ctx.account = account
        ctx.save_for_backward(valid)
        return log_keep.view_as(log_keep)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (valid,) = ctx.saved_tensors
        per_alpha = ctx.account.gradient()[:, None, None] * valid[:, None]
        return grad, per_alpha.expand_as(grad).to(grad.dtype), None, None
