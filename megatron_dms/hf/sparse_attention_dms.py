"""Which query may read which pair: positions, decisions that arrive with a lag, and attention over the pairs
that are left.

The prefill, the token-by-token steps and the forward without a cache share this file, so that the three
cannot drift apart.

Shapes: B sequences, H query heads, G KV heads, R = H / G, T new tokens of this forward, K readable pairs, D
head size. A *position* counts the real tokens of its own sequence from 0 (padding is not counted); the window
is measured in positions. The position of padding and of an empty slot is -1. RoPE has been applied before.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_MASK_ELEMENTS = 2**24
"""The most entries of one mask; queries are taken in blocks to stay below (distances in int64: 128 MiB)."""


class NewTokens(NamedTuple):
    """Where the tokens of this forward stand in their sequences."""

    position_BT: Tensor
    """[B, T] int64, -1 for padding."""
    before_B: Tensor
    """[B] int64: real tokens of the sequence that came in earlier forwards."""
    count_B: Tensor
    """[B] int64: real tokens of the sequence in this forward."""
    column_BT: Tensor | None
    """[B, T] int64: the column of the r-th real token, meaningless from r = count_B on; None: no padding."""

    @classmethod
    def place(cls, before_B: Tensor, T: int, real_BT: Tensor | None) -> "NewTokens":
        """Count on from `before_B`; `real_BT` is False for padding, None where nothing is padding."""
        if real_BT is None:
            position_BT = before_B[:, None] + torch.arange(T, device=before_B.device)
            return cls(position_BT, before_B, torch.full_like(before_B, T), None)
        position_BT = (before_B[:, None] + real_BT.cumsum(dim=1) - 1).masked_fill(~real_BT, -1)
        column_BT = torch.argsort((~real_BT).int(), dim=1, stable=True)
        return cls(position_BT, before_B, real_BT.sum(dim=1), column_BT)

    def to(self, device: torch.device) -> "NewTokens":
        """The same tokens on another device, for models that are spread over several devices."""
        column_BT = None if self.column_BT is None else self.column_BT.to(device)
        return NewTokens(
            self.position_BT.to(device), self.before_B.to(device), self.count_B.to(device), column_BT
        )


class ReadablePairs(NamedTuple):
    """The pairs that the queries of one forward may read, before the causal and window rules."""

    k_BGKD: Tensor
    v_BGKD: Tensor
    position_BGK: Tensor
    """int64, -1 where there is no pair."""
    marked_BGK: Tensor
    """bool: the decision is to evict. False also while the decision is still unknown."""


def arriving_marks(evict_BGT: Tensor, new: NewTokens, position_BGK: Tensor, lag: int) -> Tensor:
    """[B, G, K] bool: True where this forward's tokens bring the decision "evict" for that pair.

    The token at position j + lag decides about the pair at position j. A pair whose deciding token came
    earlier, or has not come yet, gets False. Every decision arrives exactly once, so callers OR the results.
    """
    rank_BGK = position_BGK + lag - new.before_B[:, None, None]  # index among this forward's real tokens
    arrives_BGK = (position_BGK >= 0) & (rank_BGK >= 0) & (rank_BGK < new.count_B[:, None, None])
    index_BGK = rank_BGK.clamp(0, evict_BGT.shape[-1] - 1)
    if new.column_BT is not None:
        column_BGT = new.column_BT[:, None].expand(-1, position_BGK.shape[1], -1)
        index_BGK = column_BGT.gather(2, index_BGK)
    return arrives_BGK & evict_BGT.gather(2, index_BGK)


def held_after(position_BGK: Tensor, marked_BGK: Tensor, last_B: Tensor, window: int) -> Tensor:
    """[B, G, K] bool: pairs that the token at position `last_B` still reads, and that are therefore held.

    Pair k is held if last - k <= window, or if it is not (yet) marked.
    """
    age_BGK = last_B[:, None, None] - position_BGK
    return (position_BGK >= 0) & ((age_BGK <= window) | ~marked_BGK)


def attend(
    q_BHTD: Tensor, pairs: ReadablePairs, new: NewTokens, window: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Exact DMS attention with hard decisions; the T new tokens must be the last T pairs, in order, or T = 1.

    Query i reads pair j <= i if i - j <= window or j is not marked. (A pair older than the window is always
    decided, because the settings keep lag <= window + 1.)

    Returns:
        [B, H, T, D]. Rows of padding queries are finite and meaningless.
    """
    B, H, T, D = q_BHTD.shape
    G, K = pairs.k_BGKD.shape[1:3]
    if T == 1:
        # All R queries of a group share one mask row, so they become the rows and nothing is copied.
        out = _attend_block(
            q_BHTD.reshape(B * G, 1, H // G, D), pairs, new.position_BT, window, scale, dropout
        )
        return out.reshape(B, H, 1, D)
    q_NRTD = q_BHTD.reshape(B * G, H // G, T, D)
    block = max(1, MAX_MASK_ELEMENTS // (B * G * K))
    out_blocks = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        past = slice(0, K - T + stop)  # later columns are in every query's future
        visible = ReadablePairs(*(part[:, :, past] for part in pairs))
        position_BQ = new.position_BT[:, start:stop]
        out_blocks.append(
            _attend_block(q_NRTD[:, :, start:stop], visible, position_BQ, window, scale, dropout)
        )
    return torch.cat(out_blocks, dim=2).reshape(B, H, T, D)


def _attend_block(
    q_NRQD: Tensor, pairs: ReadablePairs, position_BQ: Tensor, window: int, scale: float, dropout: float
) -> Tensor:
    """Attention of one block of queries. N = B * G. With T = 1, the dimensions R and Q are exchanged."""
    N, R = q_NRQD.shape[:2]
    K, D = pairs.k_BGKD.shape[2:]
    age_BGQK = position_BQ[:, None, :, None] - pairs.position_BGK[:, :, None, :]
    exists_BGQK = (pairs.position_BGK >= 0)[:, :, None, :] & (age_BGQK >= 0)
    visible_BGQK = exists_BGQK & ((age_BGQK <= window) | ~pairs.marked_BGK[:, :, None, :])
    # Padding would see nothing, and softmax over nothing is NaN. It sees everything: nobody reads its output.
    visible_BGQK |= (position_BQ < 0)[:, None, :, None]
    return F.scaled_dot_product_attention(
        q_NRQD,
        pairs.k_BGKD.reshape(N, 1, K, D).expand(N, R, K, D),
        pairs.v_BGKD.reshape(N, 1, K, D).expand(N, R, K, D),
        attn_mask=visible_BGQK.reshape(N, 1, -1, K),
        dropout_p=dropout,
        scale=scale,
    )
