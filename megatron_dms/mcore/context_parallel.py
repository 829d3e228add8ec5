"""Context parallelism: outside attention a rank has some tokens of all heads, inside it all tokens of some
heads.

Megatron cuts a sequence into 2C chunks for C ranks; rank r holds chunks r and 2C - 1 - r, so that the causal
triangle is cut into equal shares for those who attend in place. Here an all-to-all turns that into whole
sequences in their natural order, each rank with its share of the heads of this tensor-parallel rank, and a
second one turns the output back. In between, decisions, their lag and noise, merging and every attention
back-end are those of one process, and each key, value and decision reaches every query exactly once.

Where there are fewer KV heads than ranks, neighbours share one: it is sent to all of them, its gradients are
added up, and the first of them counts its decisions.
"""

import torch
import torch.distributed as dist
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

_TOKENWISE = ("tokens", "labels", "loss_mask", "position_ids")


def own_tokens(batch: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """A batch whose inputs, labels and masks are this rank's part; what concerns whole samples stays.

    The order of the parts is Megatron's (0.19.2), which its rotary embedding follows, and HeadExchange.
    """
    if group.size() == 1:
        return batch
    part = {name: batch[name] for name in _TOKENWISE}
    return batch | get_batch_on_this_cp_rank(part, is_hybrid_cp=False, cp_group=group)


class HeadExchange:
    """Between a rank's tokens of all heads and all tokens of a rank's heads.

    C ranks, H query heads and G KV heads on each before the exchange; C must divide H, and divide G or be
    divided by it (training/layout.py).

    Attributes:
        groups: KV heads of a rank inside attention, G / C, or 1 where several ranks share it.
        first_group: the number of its first one among the G.
        counts: whether this rank is the one that counts the decisions of its KV heads.
    """

    def __init__(self, group: dist.ProcessGroup, groups: int) -> None:
        self.group = group
        ranks, rank = group.size(), group.rank()
        self._copies = max(ranks // groups, 1)
        self.groups = max(groups // ranks, 1)
        self.first_group = rank * groups // ranks
        self.counts = rank % self._copies == 0

    def to_whole_sequence(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query [T/C, B, H, D], key [T/C, B, G, D], value [T/C, B, G, X] -> [T, B, H/C, D], [T, B, groups, D]
        and [T, B, groups, X]."""
        if self.group.size() == 1:
            return query, key, value
        pairs = torch.cat([key, value], dim=-1)
        pairs = pairs.unsqueeze(3).expand(-1, -1, -1, self._copies, -1).flatten(2, 3)
        whole = self._to_heads(pairs)
        return self._to_heads(query), *whole.split([key.shape[-1], value.shape[-1]], dim=-1)

    def to_own_tokens(self, x: Tensor) -> Tensor:
        """[T, B, H/C, D] -> [T/C, B, H, D], the inverse of what happened to the queries."""
        ranks = self.group.size()
        if ranks == 1:
            return x
        chunks = x.unflatten(0, (2 * ranks, -1))
        parts = torch.stack([chunks[:ranks], chunks[ranks:].flip(0)], dim=1)  # [C, 2, T/2C, B, H/C, D]
        parts = _AllToAll.apply(parts.flatten(1, 2), self.group)
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _to_heads(self, x: Tensor) -> Tensor:
        """[T/C, B, h, D] -> [T, B, h/C, D]: rank p gets the p-th share of the heads."""
        ranks = self.group.size()
        shares = x.unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4)  # [C, T/C, B, h/C, D]
        parts = _AllToAll.apply(shares, self.group).unflatten(1, (2, -1))  # by rank, its two chunks
        return torch.cat([parts[:, 0], parts[:, 1].flip(0)]).flatten(0, 1)


class _AllToAll(Function):
    """Entry p of the first dimension goes to rank p: its own inverse, and its own backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad, ctx.group), None
