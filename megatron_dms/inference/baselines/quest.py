"""Quest: every pair is held, and a query reads the pages whose keys could give it the highest scores.

A page's summary is the least and the greatest value of each channel of its keys. No key of the page can have
a higher product with q than the sum over channels of max(q * least, q * greatest). The KV head reads its
pages for all query heads of the group, so these have to agree. Each query head's bounds become shares of
attention (a softmax over the pages), and the mean of the shares decides. Every query head thus has the same
weight whatever the size of its scores, a page that one head needs badly is read, and for a single head the
order is that of the paper.

A summary is two vectors, like a pair, and counts as a pair in memory and reads. A query reads the summaries
of all pages and the pairs of the chosen pages. If that would be no fewer than all pairs, the query reads all
pairs instead, and no summary.

Shapes as in layer.py; M pages read, O pages of the longest sequence, I pairs of one of Quest's pages.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dms.hf.sparse_attention_dms import NewTokens

from .layer import PolicyLayer, to_heads
from .policies import Quest


class QuestLayer(PolicyLayer):
    """A layer that holds every pair, so that a pair's index is its position."""

    memory = (*PolicyLayer.memory, "least_NOD", "greatest_NOD")

    policy: Quest
    least_NOD: Tensor
    """The least value of each channel over the keys of each page."""
    greatest_NOD: Tensor
    """The greatest value of each channel over the keys of each page."""

    def _columns(self, new: NewTokens) -> int:
        pairs = int(new.count_B.max()) + self.max_new_tokens
        size = self.policy.pairs_per_page
        return -(-pairs // size) * size

    def _choose(self, q_BHTD: Tensor, k_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        return to_heads(new.position_BT >= 0, self.groups)

    def _remember(self, k_NTD: Tensor, new: NewTokens, remembered: Callable[[Tensor], Tensor]) -> None:
        by_page = (len(k_NTD), -1, self.policy.pairs_per_page, k_NTD.shape[-1])
        # The keys come from the pool, which has them in order and without padding.
        k_NOID = self.pool.keys_PSD.flatten(0, 1)[self.slot_NC].view(by_page)
        absent_NOI1 = ~self._exists_NC().view(*by_page[:3], 1)
        exists_NO1 = ~absent_NOI1.all(dim=2)
        # A page that does not exist yet gets finite values: 0 * inf would be NaN.
        self.least_NOD = k_NOID.masked_fill(absent_NOI1, torch.inf).amin(dim=2).where(exists_NO1, 0)
        self.greatest_NOD = k_NOID.masked_fill(absent_NOI1, -torch.inf).amax(dim=2).where(exists_NO1, 0)

    def _take_token(
        self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, new: NewTokens, scale: float
    ) -> Tensor:
        self._append(k_BG1D.flatten(0, 2), v_BG1D.flatten(0, 2))
        size = self.policy.pairs_per_page
        count_N = self.pool.count_N
        pages_N = -(-count_N // size)
        chosen_N = self.policy.pages(self.budget_N)
        # All chosen pages but the last one are full.
        sparse_N = pages_N + (chosen_N - 1) * size + (count_N - (pages_N - 1) * size)
        dense_N = (chosen_N >= pages_N) | (sparse_N >= count_N)
        q_NRD = q_BH1D.reshape(len(count_N), -1, q_BH1D.shape[-1])
        page_NM = self._best_pages(q_NRD, pages_N, torch.where(dense_N, pages_N, chosen_N), scale)
        out_NRD = self._read_pages(q_NRD, page_NM, scale)
        self.read_BG = torch.where(dense_N, count_N, sparse_N).view(-1, self.groups)
        self.evicted_BG = torch.zeros_like(self.read_BG)
        return out_NRD.reshape(*q_BH1D.shape[:3], -1)

    def _append(self, k_ND: Tensor, v_ND: Tensor) -> None:
        """Write one pair into each head, and update the summary of the head's last page."""
        pool = self.pool
        index_N = pool.count_N.clone()
        slot_N = pool.take_one(torch.zeros_like(index_N, dtype=torch.bool), index_N)
        pool.write(slot_N, k_ND, v_ND)
        self.slot_NC.scatter_(1, index_N[:, None], slot_N[:, None])
        head_N, page_N = torch.arange(len(index_N), device=self.device), index_N // self.policy.pairs_per_page
        opens_N1 = (index_N % self.policy.pairs_per_page == 0)[:, None]
        for summary_NOD, extreme in ((self.least_NOD, torch.minimum), (self.greatest_NOD, torch.maximum)):
            so_far_ND = summary_NOD[head_N, page_N]
            summary_NOD[head_N, page_N] = torch.where(opens_N1, k_ND, extreme(so_far_ND, k_ND))

    def _best_pages(self, q_NRD: Tensor, pages_N: Tensor, wanted_N: Tensor, scale: float) -> Tensor:
        """[N, M] int64: the best `wanted_N` of each head's `pages_N` pages, followed by -1."""
        exact = torch.float64 if q_NRD.dtype == torch.float64 else torch.float32
        q_NRD = q_NRD * scale
        # max(q * least, q * greatest) is q * greatest where q is positive, and q * least elsewhere.
        bound_NRO = torch.bmm(q_NRD.clamp(min=0), self.greatest_NOD.transpose(1, 2))
        bound_NRO = bound_NRO + torch.bmm(q_NRD.clamp(max=0), self.least_NOD.transpose(1, 2))
        nth_O = torch.arange(bound_NRO.shape[2], device=self.device)
        absent_NO = nth_O >= pages_N[:, None]
        share_NO = bound_NRO.to(exact).masked_fill(absent_NO[:, None], -torch.inf).softmax(dim=2).mean(dim=1)
        share_NO = share_NO.masked_fill(nth_O == pages_N[:, None] - 1, 2.0)  # being filled: always read
        M = int(wanted_N.max())
        page_NM = share_NO.masked_fill(absent_NO, -1.0).topk(M, dim=1).indices
        return page_NM.masked_fill(torch.arange(M, device=self.device) >= wanted_N[:, None], -1)

    def _read_pages(self, q_NRD: Tensor, page_NM: Tensor, scale: float) -> Tensor:
        """[N, R, D]: attention over the pairs of the pages `page_NM`."""
        size, pool = self.policy.pairs_per_page, self.pool
        index_NK = (page_NM[:, :, None] * size + torch.arange(size, device=self.device)).flatten(1)
        exists_NK = (index_NK >= 0) & (index_NK < pool.count_N[:, None])
        # A missing pair is read from the head's own first slot, because another head's slot could hold a NaN.
        slot_NK = self.slot_NC.gather(1, index_NK.masked_fill(~exists_NK, 0))
        return F.scaled_dot_product_attention(
            q_NRD[:, None],
            pool.keys_PSD.flatten(0, 1)[slot_NK][:, None],
            pool.values_PSD.flatten(0, 1)[slot_NK][:, None],
            attn_mask=exists_NK[:, None, None],
            scale=scale,
        )[:, 0]

    @property
    def occupied_BG(self) -> Tensor:
        """[B, G] int64: pairs and summaries."""
        return self.held_BG + -(-self.held_BG // self.policy.pairs_per_page)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys, values and summaries."""
        return self.pool.kv_bytes + self.least_NOD.nbytes + self.greatest_NOD.nbytes

    @property
    def bookkeeping_bytes(self) -> int:
        return super().bookkeeping_bytes - self.least_NOD.nbytes - self.greatest_NOD.nbytes
