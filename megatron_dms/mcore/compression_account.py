"""The compression account of one microbatch: exact under any layout of ranks.

The compression loss clamps each sample's mean alpha over the WHOLE model (DMS paper, section 3), while a rank
sees only its own layers and KV heads. Its gradient is simple, though: -weight / (B L G T) for each alpha of a
sample below target, else 0. So each rank adds up its decisions in the forward pass; when its last layer has
reported, it starts an all-reduce of that small vector over the model's ranks; in the backward pass each alpha
waits for it and takes its gradient. Every stage, virtual ones too, runs a microbatch's forward before any
runs its backward, so this cannot deadlock in any pipeline schedule, and the result is that of one process.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class ModelShape:
    """The counts over which decisions are averaged, and this rank's share of them."""

    layers: int
    """L, of the whole model."""
    groups: int
    """G, KV heads of a layer of the whole model."""
    local_layers: int
    """Layers of this rank: of all its virtual stages, where there are several."""
    ranks: dist.ProcessGroup | None
    """The ranks that hold one copy of the model (TP x CP x PP), in a gloo group of their own; None for a
    single process. Not NCCL: Megatron synchronises the whole device between a stage's forward and its send,
    and an NCCL all-reduce that waits for the next stage's forward would then wait for ever."""


@dataclass
class CompressionAccount:
    """Sums of one microbatch's decisions; B samples.

    Attributes:
        shape: the model's counts.
        target: alpha*, the evicted fraction asked for.
        tokens: [B] fp32, valid tokens of each sample.
        loss_weight: factor on the compression loss in the gradient, before the mean over samples; holds
            everything that Megatron applies to the main loss on its way (loss scale, 1 / microbatches).
    """

    shape: ModelShape
    target: float
    tokens: Tensor
    loss_weight: float | Tensor
    _reported: set[int] = field(default_factory=set)
    _sums: Tensor | None = None
    _pending: dist.Work | None = None

    def report(self, layer: int, heads: Tensor, alpha: Tensor, hard: Tensor, valid: Tensor) -> None:
        """Add one layer's decisions. A layer that reports again (recomputation) is counted once.

        Args:
            layer: global layer number from 0.
            heads: [g] global numbers of this rank's KV heads.
            alpha, hard: [B, g, T] soft and hard decisions.
            valid: [B, T] bool; nothing is, where another rank reports the same decisions.
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
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._sums = self._sums.to(self.tokens.device)
        if self._sums is None or len(self._reported) != self.shape.local_layers:
            raise RuntimeError(
                f"{len(self._reported)} of {self.shape.local_layers} layers of this rank have reported"
            )
        return self._sums

    def mean_alpha(self, hard: bool) -> Tensor:
        """[B]: each sample's mean decision over all layers, KV heads and valid tokens."""
        B = len(self.tokens)
        sums = self._totals()[B : 2 * B] if hard else self._totals()[:B]
        return sums / (self.tokens * self.shape.layers * self.shape.groups)

    def evicted_per_head(self) -> Tensor:
        """[L, G]: evicted tokens by layer and KV head, summed over the samples."""
        return self._totals()[2 * len(self.tokens) :].view(self.shape.layers, self.shape.groups)

    def gradient(self) -> Tensor:
        """[B]: d loss / d alpha, the same for each alpha of a sample."""
        below = (self.mean_alpha(hard=True) < self.target).float()
        count = self.tokens * self.shape.layers * self.shape.groups
        return -self.loss_weight * below / (len(self.tokens) * count)


def attach_compression_loss(
    log_keep: Tensor, alpha: Tensor, valid: Tensor, account: CompressionAccount
) -> Tensor:
    """Return log_keep unchanged; in the backward pass alpha receives the compression loss's gradient.

    Args:
        log_keep, alpha: [B, G, T], functions of the same logits.
        valid: [B, T] bool; padding receives nothing.
        account: the microbatch's account.
    """
    return _AttachCompressionLoss.apply(log_keep, alpha, valid, account)


class _AttachCompressionLoss(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, log_keep: Tensor, alpha: Tensor, valid: Tensor, account: CompressionAccount
    ) -> Tensor:
        ctx.account = account
        ctx.save_for_backward(valid)
        return log_keep.view_as(log_keep)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (valid,) = ctx.saved_tensors
        per_alpha = ctx.account.gradient()[:, None, None] * valid[:, None]
        return grad, per_alpha.expand_as(grad).to(grad.dtype), None, None
