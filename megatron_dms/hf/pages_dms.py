"""Where the pairs of one layer lie: in pages of equal size, each owned by one head, in one pool for all.

A head takes a page when its last page is full, so heads that keep few pairs take little memory. Pages are
handed out in ascending order and are never given back within a sequence, because the number of pairs that a
head holds never falls. Hence all pages of a head but its last one are full, the last page has the highest
number, and the free pages are at the end.

All tensors are allocated outside of torch.inference_mode, so that a cache works in it and outside. They
change in place, so that a CUDA graph can replay a step. Only a growth and a selection of heads move them.

Shapes: N heads (sequence times KV head), P pages, S slots of a page, D head size, K pairs of the fullest
head, T new tokens. A *slot* of the pool is page * S + place in the page; the *index* of a pair counts the
pairs of its head from 0 in the order of its pages.
"""

import torch
from torch import Tensor

PAGE_SIZE = 64
"""Pairs in a page. Half a page per head stays empty on average; 32 and 128 are not faster (on a CPU)."""
GROWTH = 16
"""The pool grows by a 16th, so it is at most a 16th larger than the heads have needed."""
MIN_GROWTH = 2
"""The least number of pages that are added at a time."""
STEPS_AHEAD = 8
"""A growth makes room for this many pairs in every head, so that steps seldom wait for the device."""


def allocate(pages: int, like_PSD: Tensor) -> Tensor:
    """[pages, S, D] of zeros: attention gives empty slots the weight 0, and 0 * NaN would be NaN."""
    return like_PSD.new_zeros(pages, *like_PSD.shape[1:])


class PagePool:
    """The pages of one layer and their owners."""

    def __init__(self, heads: int, key_like: Tensor, value_like: Tensor) -> None:
        """Start without pages.

        Args:
            heads: N.
            key_like, value_like: [..., D], with the type and device that the pages are to have.
        """
        device = key_like.device
        self.keys_PSD = key_like.new_zeros(0, PAGE_SIZE, key_like.shape[-1])
        self.values_PSD = value_like.new_zeros(0, PAGE_SIZE, value_like.shape[-1])
        self.owner_P = torch.zeros(0, dtype=torch.int64, device=device)  # N for a free page
        self.fill_P = torch.zeros(0, dtype=torch.int32, device=device)  # pairs in the page
        self.count_N = torch.zeros(heads, dtype=torch.int64, device=device)  # pairs of the head
        self.last_page_N = torch.zeros(
            heads, dtype=torch.int64, device=device
        )  # meaningless while it has no pair
        self.used = torch.zeros((), dtype=torch.int64, device=device)  # pages that have an owner
        self.sure_steps = 0  # steps for which there are pages whatever they append

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that live from step to step."""
        by_page = (self.keys_PSD, self.values_PSD, self.owner_P, self.fill_P)
        return (*by_page, self.count_N, self.last_page_N, self.used)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, empty slots included."""
        return bytes_of(self.keys_PSD) + bytes_of(self.values_PSD)

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes of everything else."""
        return sum(map(bytes_of, self.state)) - self.kv_bytes

    def write(self, slot_X: Tensor, key_XD: Tensor, value_XD: Tensor) -> None:
        """Write pairs into slots, without their gradients: autograd does not allow the writes in place."""
        self.keys_PSD.flatten(0, 1).index_copy_(0, slot_X, key_XD.detach())
        self.values_PSD.flatten(0, 1).index_copy_(0, slot_X, value_XD.detach())

    def take_one(self, reuse_N: Tensor, slot_N: Tensor) -> Tensor:
        """[N] int64: the slot for a new pair of each head: `slot_N` where `reuse_N`, else at the head's end.

        There must be pages for the new pairs. `make_room` provides them, and waits for the device, which this
        function must not do.
        """
        S = self.keys_PSD.shape[1]
        place_N = self.count_N % S
        opens_N = ~reuse_N & (place_N == 0)
        opened_N = opens_N.cumsum(dim=0)
        self.last_page_N.copy_(torch.where(opens_N, self.used + opened_N - 1, self.last_page_N))
        self.used += opened_N[-1]
        self.count_N += ~reuse_N
        # Every head has a pair by now, so all heads are written, and none has to be selected.
        heads_N = torch.arange(len(self.count_N), device=self.count_N.device)
        self.owner_P.index_copy_(0, self.last_page_N, heads_N)
        self.fill_P.index_copy_(0, self.last_page_N, ((self.count_N - 1) % S + 1).int())
        return torch.where(reuse_N, slot_N, self.last_page_N * S + place_N)

    def make_room(self, steps: int = STEPS_AHEAD) -> bool:
        """Grow, unless there are pages for that many steps, whatever they append.

        This waits for the device: call it only when `sure_steps` has come to 0.

        Returns:
            Whether the pages have moved.
        """
        N, S = len(self.count_N), self.keys_PSD.shape[1]
        *room_N, used = torch.cat([-self.count_N % S, self.used[None]]).tolist()
        wanted = used + sum(-(-max(steps - room, 0) // S) for room in room_N)
        grows = wanted > len(self.owner_P)
        if grows:
            self._grow(wanted)
        # If all heads append at every step, a head opens pages at its steps room + 1, room + 1 + S, ...
        free = len(self.owner_P) - used
        self.sure_steps = sorted(room_N)[free % N] + S * (free // N)
        return grows

    def take_many(self, more_N: Tensor, index_NT: Tensor) -> Tensor:
        """Lengthen the heads by `more_N` pairs.

        Returns:
            [N, T] int64: the slots of the pairs `index_NT`; meaningless where a pair is not new.
        """
        S = self.keys_PSD.shape[1]
        pages_N = _pages(self.count_N, S)
        self.count_N += more_N
        opened_N = _pages(self.count_N, S) - pages_N
        used, opened = torch.stack([self.used, opened_N.sum()]).tolist()
        if used + opened > len(self.owner_P):
            self._grow(used + opened)
        end_N = used + opened_N.cumsum(dim=0)
        page_NT = index_NT // S - pages_N[:, None]  # counted from the first one opened now
        page_NT = torch.where(page_NT < 0, self.last_page_N[:, None], (end_N - opened_N)[:, None] + page_NT)
        heads_N = torch.arange(len(self.count_N), device=end_N.device)
        self.owner_P[used : used + opened] = heads_N.repeat_interleave(opened_N)
        self.fill_P[used : used + opened] = S
        self.fill_P[self.last_page_N[(pages_N > 0) & (opened_N > 0)]] = S
        self.last_page_N.copy_(torch.where(opened_N > 0, end_N - 1, self.last_page_N))
        some_N = self.count_N > 0
        self.fill_P[self.last_page_N[some_N]] = ((self.count_N[some_N] - 1) % S + 1).int()
        self.used += opened
        self.sure_steps = 0
        return page_NT * S + index_NT % S

    @torch.inference_mode(False)
    def _grow(self, pages: int) -> None:
        """Grow to at least that many pages. Each old tensor is freed as soon as it is copied."""
        now = len(self.owner_P)
        pages = max(pages, _with_spare(now))
        self.keys_PSD = _enlarged(self.keys_PSD, pages)
        self.values_PSD = _enlarged(self.values_PSD, pages)
        free = pages - now
        self.owner_P = torch.cat([self.owner_P, self.owner_P.new_full((free,), len(self.count_N))])
        self.fill_P = torch.cat([self.fill_P, self.fill_P.new_zeros(free)])

    def slots_by_head(self) -> tuple[Tensor, Tensor]:
        """[N, K] int64: the slots of each head's pairs in order, and [N, K] bool: whether the pair exists."""
        S = self.keys_PSD.shape[1]
        order_P, first_N = self._pages_by_head()
        index_K = torch.arange(int(self.count_N.max()), device=self.count_N.device)
        exists_NK = index_K < self.count_N[:, None]
        nth_NK = (first_N[:, None] + index_K // S).masked_fill(~exists_NK, 0)
        return order_P[nth_NK] * S + index_K % S, exists_NK

    def _pages_by_head(self) -> tuple[Tensor, Tensor]:
        """[P]: the pages, sorted by head and then by number, and [N]: each head's first place among them."""
        pages_N = _pages(self.count_N, self.keys_PSD.shape[1])
        return torch.argsort(self.owner_P, stable=True), pages_N.cumsum(dim=0) - pages_N

    def select_heads(self, head_M: Tensor, slot_MW: Tensor) -> Tensor:
        """Keep, repeat or permute heads: head m becomes a copy of what head `head_M[m]` is now.

        Args:
            slot_MW: slots of pairs of that head; any slot in range where there is no pair.

        Returns:
            The new slots of these pairs, in the shape of `slot_MW`.
        """
        S = self.keys_PSD.shape[1]
        order_P, first_N = self._pages_by_head()
        pages_M = _pages(self.count_N, S)[head_M]
        start_M = pages_M.cumsum(dim=0) - pages_M
        total = int(pages_M.sum())
        owner_X = torch.arange(len(head_M), device=head_M.device).repeat_interleave(pages_M)
        nth_X = torch.arange(total, device=head_M.device) - start_M[owner_X]
        source_X = order_P[first_N[head_M][owner_X] + nth_X]

        rank_P = torch.zeros_like(self.owner_P)  # the n-th page of its head has rank n
        rank_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        if total:
            page_MW = rank_P[slot_MW // S] - first_N[head_M][:, None] + start_M[:, None]
            slot_MW = (page_MW * S + slot_MW % S).clamp(0, total * S - 1)

        spare = _with_spare(total) - total
        keys_PSD = allocate(total + spare, self.keys_PSD)
        values_PSD = allocate(total + spare, self.values_PSD)
        torch.index_select(self.keys_PSD, 0, source_X, out=keys_PSD[:total])
        torch.index_select(self.values_PSD, 0, source_X, out=values_PSD[:total])
        self.keys_PSD, self.values_PSD = keys_PSD, values_PSD
        self.owner_P = torch.cat([owner_X, owner_X.new_full((spare,), len(head_M))])
        self.fill_P = torch.cat([self.fill_P[source_X], self.fill_P.new_zeros(spare)])
        self.count_N = self.count_N[head_M]
        self.last_page_N = (start_M + pages_M - 1).clamp(min=0)
        self.used = self.used.new_full((), total)
        self.sure_steps = 0
        return slot_MW


def bytes_of(x: Tensor) -> int:
    """The same as x.nbytes, which torch.compile cannot trace once a size has changed."""
    return x.numel() * x.element_size()


def _pages(count_N: Tensor, S: int) -> Tensor:
    """The number of pages for that many pairs."""
    return (count_N + S - 1) // S


def _with_spare(pages: int) -> int:
    return pages + max(MIN_GROWTH, pages // GROWTH)


def _enlarged(old_PSD: Tensor, pages: int) -> Tensor:
    new_PSD = allocate(pages, old_PSD)
    new_PSD[: len(old_PSD)] = old_PSD
    return new_PSD
