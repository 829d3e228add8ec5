"""Context parallelism by exchanging heads for tokens (DeepSpeed-Ulysses, arXiv 2309.14509).

Outside attention, a rank has some tokens of all heads. Inside attention, it has all tokens of some heads.

Megatron cuts a sequence into 2C chunks for C ranks. Rank r holds the chunks r and 2C - 1 - r, which cuts the
causal triangle into equal shares for implementations that attend in place. Here an all-to-all turns these
chunks into whole sequences in their natural order, and each rank gets its share of the heads of its
tensor-parallel rank. A second all-to-all turns the output back. Between the two, decisions, lag, noise,
merging and every attention back-end work as on one process, and each key, value and decision reaches every
query exactly once.

If there are fewer KV heads than ranks, neighbouring ranks share a KV head: all of them receive it, its
gradients are added up, and the first of these ranks counts its decisions.
"""

import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

_TOKENWISE = ("tokens", "labels", "loss_mask", "position_ids")


def own_tokens(batch: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return the batch with this rank's part of the inputs, labels and masks. Fields of whole samples stay.

    The order of the parts is the order of Megatron 0.19.2. Megatron's rotary embedding and HeadExchange
    follow it.
    """
    if group.size() == 1:
        return batch
    part = {name: batch[name] for name in _TOKENWISE}
    return batch | get_batch_on_this_cp_rank(part, is_hybrid_cp=False, cp_group=group)


class HeadExchange:
    """The exchange between a rank's tokens of all heads and all tokens of a rank's heads.

    There are C ranks, with H query heads and G KV heads on each before the exchange. C must divide H, and C
    must divide G or be a multiple of G (training/layout.py).

    Attributes:
        groups: the KV heads of a rank inside attention: G / C, or 1 if several ranks share one.
        first_group: the number of this rank's first KV head among the G.
        counts: whether this rank counts the decisions of its KV heads.
    """

    def __init__(self, group: dist.ProcessGroup, groups: int) -> None:
        self.group = group
        ranks, rank = group.size(), group.rank()
        self._copies = max(ranks // groups, 1)
        self.groups = max(groups // ranks, 1)
        self.first_group = rank * groups // ranks
        self.counts = rank % self._copies == 0

    def to_whole_sequence(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all tokens of this rank's heads: [T, B, H/C, D], [T, B, groups, D] and [T, B, groups, X].

        query: [T/C, B, H, D]. key: [T/C, B, G, D]. value: [T/C, B, G, X].
        """
        if self.group.size() == 1:
            return query, key, value
        pairs = torch.cat([key, value], dim=-1)
        pairs = pairs.unsqueeze(3).expand(-1, -1, -1, self._copies, -1).flatten(2, 3)
        whole = self._to_heads(pairs)
        return self._to_heads(query), *whole.split([key.shape[-1], value.shape[-1]], dim=-1)

    def to_own_tokens(self, x: Tensor) -> Tensor:
        """Return [T/C, B, H, D] from [T, B, H/C, D]: the inverse of the exchange of the queries."""
        ranks = self.group.size()
        if ranks == 1:
            return x
        chunks = x.unflatten(0, (2 * ranks, -1))
        parts = torch.stack([chunks[:ranks], chunks[ranks:].flip(0)], dim=1)  # [C, 2, T/2C, B, H/C, D]
        parts = _AllToAll.apply(parts.flatten(1, 2), self.group)
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _to_heads(self, x: Tensor) -> Tensor:
        """Return [T, B, h/C, D] from [T/C, B, h, D]: rank p gets the p-th share of the heads."""
        ranks = self.group.size()
        shares = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)  # [C, T/C, B, h/C, D]
        parts = _AllToAll.apply(shares, self.group).unflatten(1, (2, -1))  # [C, 2, T/2C, B, h/C, D]
        return torch.cat([parts[:, 0], parts[:, 1].flip(0)]).flatten(0, 1)


class _Context(FunctionCtx):
    group: dist.ProcessGroup


class _AllToAll(Function):
    """Send entry p of the first dimension to rank p. This is its own inverse, and its own backward pass."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None
