"""TOVA, H2O and the window: once a head holds its budget, each new pair replaces the pair of least worth.

The new token counts in the budget. The worst pair therefore leaves *before* the new pair is written, by the
worth after the previous query: nothing newer is known until the new query has read. That is the papers' order
(read k, drop one, come to the next token with k - 1), with the drop delayed to the moment at which the slot
is needed; every query reads the same pairs. Cutting the prompt to k and dropping one more pair at the first
step, by the same worth, also equals cutting it to k - 1. So no more than k pairs are ever held or read,
except by the prompt's last query.

Shapes as in layer.py; Q queries of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dms.hf.page_attention_dms import join_pages, weigh_pages
from megatron_dms.hf.sparse_attention_dms import MAX_MASK_ELEMENTS, NewTokens

from .layer import PolicyLayer, to_heads
from .policies import H2O, Window


class EvictingLayer(PolicyLayer):
    """A layer that holds at most its budget."""

    memory = (*PolicyLayer.memory, "position_NC")

    position_NC: Tensor
    """int64: the position of each pair."""

    def _score_prompt(self, q_BHTD: Tensor, k_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        """[N, T]: the scores of the prompt's tokens after its last query."""
        raise NotImplementedError

    def _scores(self) -> Tensor:
        """[N, C]: the scores of the pairs after the latest query."""
        raise NotImplementedError

    def _worth(self, score_NK: Tensor, position_NK: Tensor, last_N1: Tensor) -> Tensor:
        """[N, K]: the pair of the lowest worth goes first; inf for a pair that stays while any other is left.

        Args:
            score_NK, position_NK: the scores and positions of the pairs.
            last_N1: the position of the latest token, which may be a token that is still to be written.
        """
        raise NotImplementedError

    def _start_scores(self, index_N1: Tensor) -> None:
        """Give a new pair, at that index of each head, its first score."""

    def _read(self, q_NRD: Tensor, scale: float) -> Tensor:
        """[N, R, D]: attention over all pairs held; the pairs get their new scores."""
        raise NotImplementedError

    def _columns(self, new: NewTokens) -> int:
        return int(self.budget_N.max())

    def _choose(self, q_BHTD: Tensor, k_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        position_NT = to_heads(new.position_BT, self.groups)
        count_N1 = to_heads(new.count_B, self.groups)[:, None]
        self._prompt_score_NT = self._score_prompt(q_BHTD, k_BGTD, new, scale)
        worth_NT = self._worth(self._prompt_score_NT, position_NT, count_N1 - 1)
        worth_NT = worth_NT.masked_fill(position_NT < 0, -torch.inf)
        best_NT = torch.argsort(worth_NT, dim=1, descending=True, stable=True)
        kept_N1 = torch.minimum(count_N1, self.budget_N[:, None])
        among_best_NT = torch.arange(best_NT.shape[1], device=self.device) < kept_N1
        return torch.zeros_like(among_best_NT).scatter_(1, best_NT, among_best_NT)

    def _remember(self, k_NTD: Tensor, new: NewTokens, remembered: Callable[[Tensor], Tensor]) -> None:
        self.position_NC = remembered(to_heads(new.position_BT, self.groups))
        del self._prompt_score_NT

    def _take_token(
        self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, new: NewTokens, scale: float
    ) -> Tensor:
        position_N1 = to_heads(new.position_BT, self.groups)
        count_N1 = self.pool.count_N[:, None]
        full_N1 = count_N1 >= self.budget_N[:, None]
        worth_NC = self._worth(self._scores(), self.position_NC, position_N1)
        worth_NC = worth_NC.masked_fill(~self._exists_NC(), torch.inf)
        worst_N1 = worth_NC.argmin(dim=1, keepdim=True)
        index_N1 = torch.where(full_N1, worst_N1, count_N1)
        slot_N = self.pool.take_one(full_N1[:, 0], self.slot_NC.gather(1, worst_N1)[:, 0])
        self.pool.write(slot_N, k_BG1D.flatten(0, 2), v_BG1D.flatten(0, 2))
        self.slot_NC.scatter_(1, index_N1, slot_N[:, None])
        self.position_NC.scatter_(1, index_N1, position_N1)
        self._start_scores(index_N1)
        out_NRD = self._read(q_BH1D.reshape(len(slot_N), -1, q_BH1D.shape[-1]), scale)
        self.read_BG = self.held_BG
        self.evicted_BG = full_N1.reshape(-1, self.groups)
        return out_NRD.reshape(*q_BH1D.shape[:3], -1)


class WeighingLayer(EvictingLayer):
    """An evicting layer whose scores come from attention weights."""

    memory = (*EvictingLayer.memory, "score_NC")

    score_NC: Tensor
    """fp32 or fp64: the score of each pair."""

    def _remember(self, k_NTD: Tensor, new: NewTokens, remembered: Callable[[Tensor], Tensor]) -> None:
        self.score_NC = remembered(self._prompt_score_NT)
        super()._remember(k_NTD, new, remembered)

    def _scores(self) -> Tensor:
        return self.score_NC

    def _start_scores(self, index_N1: Tensor) -> None:
        self.score_NC.scatter_(1, index_N1, 0.0)

    def _read(self, q_NRD: Tensor, scale: float) -> Tensor:
        pool = self.pool
        weight_PRS, sum_NR = weigh_pages(q_NRD, pool.keys_PSD, pool.owner_P, pool.fill_P, scale)
        out_NRD = join_pages(weight_PRS, sum_NR, pool.values_PSD, pool.owner_P)
        # The mean over the query heads of each KV head, as a matrix product that never forms the quotients.
        share_PR = 1 / (sum_NR.clamp(min=0.5)[pool.owner_P] * q_NRD.shape[1])
        weight_X = torch.bmm(share_PR[:, None], weight_PRS).flatten()
        self._renew(weight_X[self.slot_NC].masked_fill_(~self._exists_NC(), 0))
        return out_NRD.to(q_NRD.dtype)

    def _renew(self, weight_NC: Tensor) -> None:
        """Update the scores with the weights [N, C] of the latest query, means over each KV head's group."""
        raise NotImplementedError


class TOVALayer(WeighingLayer):
    """Scores are the latest query's weights, averaged over all query heads of the layer.

    All heads of a sequence have the same scores, so they hold the same tokens in the same columns.
    """

    def _score_prompt(self, q_BHTD: Tensor, k_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        last_B = new.position_BT.argmax(dim=1)  # a column: padding may follow it
        q_BH1D = q_BHTD[torch.arange(len(last_B), device=last_B.device), :, last_B][:, :, None]
        position_B1 = new.position_BT.gather(1, last_B[:, None])
        weight_BGT = prompt_weights(q_BH1D, k_BGTD, position_B1, new.position_BT, scale)[:, :, 0]
        return to_heads(weight_BGT.mean(dim=1), self.groups)

    def _worth(self, score_NK: Tensor, position_NK: Tensor, last_N1: Tensor) -> Tensor:
        return score_NK

    def _renew(self, weight_NC: Tensor) -> None:
        self.score_NC = to_heads(weight_NC.unflatten(0, (-1, self.groups)).mean(dim=1), self.groups)


class H2OLayer(WeighingLayer):
    """Scores are the weights of all queries so far, summed, for each KV head by itself."""

    policy: H2O

    def _score_prompt(self, q_BHTD: Tensor, k_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        B, H, T, _ = q_BHTD.shape
        block = max(1, MAX_MASK_ELEMENTS // (B * H * T))
        sum_BGT = torch.zeros((), device=q_BHTD.device)
        for start in range(0, T, block):
            position_BQ = new.position_BT[:, start : start + block]
            q_BHQD = q_BHTD[:, :, start : start + block]
            weight_BGQT = prompt_weights(q_BHQD, k_BGTD, position_BQ, new.position_BT, scale)
            sum_BGT = sum_BGT + weight_BGQT.sum(dim=2)
        return sum_BGT.flatten(0, 1)

    def _worth(self, score_NK: Tensor, position_NK: Tensor, last_N1: Tensor) -> Tensor:
        recent_N1 = self.policy.recent(self.budget_N)[:, None]
        return score_NK.masked_fill(position_NK > last_N1 - recent_N1, torch.inf)

    def _renew(self, weight_NC: Tensor) -> None:
        self.score_NC += weight_NC


class WindowLayer(EvictingLayer):
    """The score of a pair is its position: the oldest pair that is not among the first tokens goes."""

    policy: Window

    def _score_prompt(self, q_BHTD: Tensor, k_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        return to_heads(new.position_BT, self.groups)

    def _scores(self) -> Tensor:
        return self.position_NC

    def _worth(self, score_NK: Tensor, position_NK: Tensor, last_N1: Tensor) -> Tensor:
        sinks_N1 = self.policy.sinks(self.budget_N)[:, None]
        return score_NK.double().masked_fill(position_NK < sinks_N1, torch.inf)

    def _read(self, q_NRD: Tensor, scale: float) -> Tensor:
        pool = self.pool
        return self.attend_pages(q_NRD, pool.keys_PSD, pool.values_PSD, pool.owner_P, pool.fill_P, scale)


def prompt_weights(
    q_BHQD: Tensor, k_BGTD: Tensor, position_BQ: Tensor, position_BT: Tensor, scale: float
) -> Tensor:
    """[B, G, Q, T]: causal attention weights, the mean over the query heads of each KV head; 0 for padding.

    Args:
        position_BQ, position_BT: the positions of queries and keys, -1 for padding.

    Returns:
        The weights in fp32, or in fp64 for fp64 inputs.
    """
    exact = torch.float64 if q_BHQD.dtype == torch.float64 else torch.float32
    q_BGRQD = q_BHQD.unflatten(1, (k_BGTD.shape[1], -1))
    score_BGRQT = (q_BGRQD * scale @ k_BGTD[:, :, None].transpose(-1, -2)).to(exact)
    visible_BQT = (position_BT >= 0)[:, None] & (position_BT[:, None] <= position_BQ[:, :, None])
    score_BGRQT = score_BGRQT.masked_fill(~visible_BQT[:, None, None], -torch.inf)
    weight_BGQT = score_BGRQT.softmax(dim=-1).mean(dim=2)
    return weight_BGQT.masked_fill((position_BQ < 0)[:, None, :, None], 0)  # softmax over nothing is NaN
