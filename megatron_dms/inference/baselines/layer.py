"""The layer that all policies share: it reads the whole prompt, stores the part that the policy chooses, and
then takes one token at a time.

The *index* of a pair counts the pairs of its head from 0 in the order of the pool's pages (pages_dms.py). The
index is the pair's column in every tensor in which a policy remembers something about pairs. All heads of a
sequence hold the same number of pairs.

Shapes: B sequences, H query heads, G KV heads, N = B * G, R = H / G, T new tokens, C columns for the pairs a
head may come to hold, D head size; positions as in sparse_attention_dms.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dms.hf.cache_layer_dms import DMSCacheLayer, fresh_pairs
from megatron_dms.hf.pages_dms import PagePool
from megatron_dms.hf.sparse_attention_dms import NewTokens, attend

from .policies import Policy


class PolicyLayer(DMSCacheLayer):
    """The pairs of one attention layer in the pages of DMS, without marks.

    Subclasses decide what to drop and what to read. After each `take`, `read_BG`, `evicted_BG` and
    `occupied_BG` say what was read, dropped and held, in pairs.
    """

    memory: tuple[str, ...] = ("slot_NC", "budget_N")
    """Names of the tensors, one row per head, that follow the sequences. The prompt sets them."""

    slot_NC: Tensor
    """int64: the slot of each pair."""
    budget_N: Tensor
    """int64: the number of pairs that each head may hold or read."""
    read_BG: Tensor
    """Pairs that the latest query has read."""
    evicted_BG: Tensor
    """Pairs that were dropped in the latest forward."""

    def __init__(self, policy: Policy, max_new_tokens: int) -> None:
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        super().__init__(window=0, lag=0)

    def _forget_everything(self) -> None:
        super()._forget_everything()
        for name in self.memory:
            setattr(self, name, torch.empty(0))

    def _hold(self, heads: int, key_like: Tensor, value_like: Tensor) -> None:
        """As DMSCacheLayer, but without the ring of slots and marks, which no policy needs."""
        self.dtype, self.device = key_like.dtype, key_like.device
        self.pool = PagePool(heads, key_like, value_like)
        self.bytes_per_pair = (key_like.shape[-1] + value_like.shape[-1]) * key_like.element_size()

    def take(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        """[B, H, T, D]: attention of the new tokens, which are the prompt or one token for each sequence.

        Args:
            q_BHTD, k_BGTD: after RoPE.
            scale: factor on the scores.
        """
        if not self.is_initialized:
            self.lazy_initialization(k_BGTD, v_BGTD)
            out_BHTD = self._take_prompt(q_BHTD, k_BGTD, v_BGTD, new, scale)
            self.columns += k_BGTD.shape[2]
            return out_BHTD
        if self.pool.sure_steps == 0:
            self.pool.make_room()
        out_BHTD = self._take_token(q_BHTD, k_BGTD, v_BGTD, new, scale)
        self.count_step()
        return out_BHTD

    def _take_prompt(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, new: NewTokens, scale: float
    ) -> Tensor:
        budget_B = self.policy.budget(new.count_B + self.max_new_tokens)
        self.budget_N = budget_B.repeat_interleave(self.groups)
        never_BGT = torch.zeros(k_BGTD.shape[:3], dtype=torch.bool, device=self.device)
        out_BHTD = attend(q_BHTD, fresh_pairs(k_BGTD, v_BGTD, never_BGT, new, 0), new, 0, scale)
        kept_NT = self._choose(q_BHTD, k_BGTD, new, scale)
        index_NT = kept_NT.cumsum(dim=1) - 1
        slot_NT = self.pool.take_many(kept_NT.sum(dim=1), index_NT)
        self.pool.write(slot_NT[kept_NT], k_BGTD.flatten(0, 1)[kept_NT], v_BGTD.flatten(0, 1)[kept_NT])
        C = self._columns(new)
        place_NT = torch.where(kept_NT, index_NT, C)  # dropped pairs go to a column that is cut off

        def remembered(value_NT: Tensor) -> Tensor:
            return value_NT.new_zeros(len(value_NT), C + 1).scatter_(1, place_NT, value_NT)[:, :C]

        self.slot_NC = remembered(slot_NT)
        self._remember(k_BGTD.flatten(0, 1), new, remembered)
        # The last query of the prompt has read the whole prompt; pairs were dropped after that.
        self.read_BG = new.count_B[:, None].expand(-1, self.groups)
        self.evicted_BG = self.read_BG - self.held_BG
        return out_BHTD

    def _columns(self, new: NewTokens) -> int:
        """C, the number of columns for pairs."""
        raise NotImplementedError

    def _choose(self, q_BHTD: Tensor, k_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        """[N, T] bool: the pairs of the prompt to store."""
        raise NotImplementedError

    def _remember(self, k_NTD: Tensor, new: NewTokens, remembered: Callable[[Tensor], Tensor]) -> None:
        """Set the tensors that the steps need.

        Args:
            remembered: turns [N, T] values of tokens into [N, C] values of pairs.
        """
        raise NotImplementedError

    def _take_token(
        self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, new: NewTokens, scale: float
    ) -> Tensor:
        """Take in one token for each sequence, and return its attention [B, H, 1, D]."""
        raise NotImplementedError

    def _exists_NC(self) -> Tensor:
        """[N, C] bool: the columns that have a pair."""
        return torch.arange(self.slot_NC.shape[1], device=self.device) < self.pool.count_N[:, None]

    @property
    def occupied_BG(self) -> Tensor:
        """[B, G] int64: the memory taken, in pairs."""
        return self.held_BG

    @property
    def state(self) -> tuple[Tensor, ...]:
        return (*self.pool.state, *(getattr(self, name) for name in self.memory))

    @property
    def bookkeeping_bytes(self) -> int:
        return self.pool.bookkeeping_bytes + sum(getattr(self, name).nbytes for name in self.memory)

    def select_sequences(self, index: Tensor) -> None:
        """Keep, repeat or permute sequences, with everything remembered about their pairs."""
        if self.is_initialized:
            groups_G = torch.arange(self.groups, device=self.device)
            head_M = (index.to(self.device)[:, None] * self.groups + groups_G).flatten()
            for name in self.memory:
                setattr(self, name, getattr(self, name)[head_M])
            self.slot_NC = self.pool.select_heads(head_M, self.slot_NC)


def to_heads(x_BX: Tensor, groups: int) -> Tensor:
    """[N, ...]: the values of each sequence, repeated for each of its `groups` KV heads."""
    return x_BX.repeat_interleave(groups, dim=0)
