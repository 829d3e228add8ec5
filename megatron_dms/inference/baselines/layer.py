"""What the policies share: the prompt is read in full, then so much of it is stored as the policy wants;
after that comes one token at a time.

The *index* of a pair counts the pairs of its head from 0 in the order of the pool's pages (pages_dms.py),
which is the column of everything the policies remember about a pair. All heads of a sequence hold equally
many pairs.

Shapes: B sequences, H query heads, G KV heads, N = B * G, R = H / G, T new tokens, C columns for the pairs a
head may come to hold, D head size; positions as in sparse_attention_dms.py.
"""

import torch
from torch import Tensor

from megatron_dms.hf.cache_layer_dms import DMSCacheLayer, fresh_pairs
from megatron_dms.hf.pages_dms import PagePool
from megatron_dms.hf.sparse_attention_dms import NewTokens, attend

from .policies import Policy


class PolicyLayer(DMSCacheLayer):
    """The pairs of one attention layer in DMS's pages, without its marks; subclasses know what to drop and
    what to read. After each `take`, `read_BG`, `evicted_BG` and `occupied_BG` tell what it came to, in
    pairs."""

    memory: tuple[str, ...] = ("slot_NC", "budget_N")
    """Names of the tensors, one row per head, that follow the sequences."""

    def __init__(self, policy: Policy, max_new_tokens: int) -> None:
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        super().__init__(window=0, lag=0)

    def _forget_everything(self) -> None:
        super()._forget_everything()
        for name in self.memory:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Start with no pairs, in the shape, type and device of [B, G, T, D] states."""
        B, self.groups = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        values = key_states if value_states is None else value_states
        self.pool = PagePool(B * self.groups, key_states, values)
        self.bytes_per_pair = (key_states.shape[-1] + values.shape[-1]) * key_states.element_size()
        self.is_initialized = True

    def take(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        """[B, H, T, D]: attention of the new tokens, which are the prompt or one for each sequence.

        Args:
            q_BHTD, k_BGTD: after RoPE.
            scale: factor on the scores.
        """
        if not self.is_initialized:
            self.lazy_initialization(k_BGTD, v_BGTD)
            out_BHTD = self._prompt(q_BHTD, k_BGTD, v_BGTD, new, scale)
            self.columns += k_BGTD.shape[2]
            return out_BHTD
        if self.pool.sure_steps == 0:
            self.pool.make_room()
        out_BHTD = self._step(q_BHTD, k_BGTD, v_BGTD, new, scale)
        self.count_step()
        return out_BHTD

    def _prompt(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        budget_B = self.policy.budget(new.count_B + self.max_new_tokens)
        self.budget_N = budget_B.repeat_interleave(self.groups)
        never_BGT = torch.zeros(k_BGTD.shape[:3], dtype=torch.bool, device=self.device)
        out_BHTD = attend(q_BHTD, fresh_pairs(k_BGTD, v_BGTD, never_BGT, new, 0), new, 0, scale)
        kept_NT = self._choose(q_BHTD, k_BGTD, new, scale)
        index_NT = kept_NT.cumsum(dim=1) - 1
        slot_NT = self.pool.take_many(kept_NT.sum(dim=1), index_NT)
        self.pool.write(slot_NT[kept_NT], k_BGTD.flatten(0, 1)[kept_NT], v_BGTD.flatten(0, 1)[kept_NT])
        C = self._columns(new)
        place_NT = torch.where(kept_NT, index_NT, C)  # the others go to a column that is cut off

        def remembered(value_NT: Tensor) -> Tensor:
            return value_NT.new_zeros(len(value_NT), C + 1).scatter_(1, place_NT, value_NT)[:, :C]

        self.slot_NC = remembered(slot_NT)
        self._remember(k_BGTD.flatten(0, 1), new, remembered)
        # The last query of the prompt has read all of it: only then was anything dropped.
        self.read_BG = new.count_B[:, None].expand(-1, self.groups)
        self.evicted_BG = self.read_BG - self.held_BG
        return out_BHTD

    def _columns(self, new: NewTokens) -> int:
        """C."""
        raise NotImplementedError

    def _choose(self, q_BHTD: Tensor, k_BGTD: Tensor, new: NewTokens, scale: float) -> Tensor:
        """[N, T] bool: which pairs of the prompt to store."""
        raise NotImplementedError

    def _remember(self, k_NTD: Tensor, new: NewTokens, remembered) -> None:
        """Set what the steps need; `remembered` turns [N, T] values of tokens into [N, C] ones of pairs."""
        raise NotImplementedError

    def _step(self, q_BH1D: Tensor, k_BG1D: Tensor, v_BG1D: Tensor, new: NewTokens, scale: float) -> Tensor:
        """Take in one token for each sequence; returns [B, H, 1, D]."""
        raise NotImplementedError

    def _exists_NC(self) -> Tensor:
        """[N, C] bool: the columns in which there is a pair."""
        return torch.arange(self.slot_NC.shape[1], device=self.device) < self.pool.count_N[:, None]

    @property
    def occupied_BG(self) -> Tensor:
        """[B, G] int64: memory taken, in pairs."""
        return self.held_BG

    @property
    def state(self) -> tuple[Tensor, ...]:
        return (*self.pool.state, *(getattr(self, name) for name in self.memory))

    @property
    def bookkeeping_bytes(self) -> int:
        return self.pool.bookkeeping_bytes + sum(getattr(self, name).nbytes for name in self.memory)

    def select_sequences(self, index: Tensor) -> None:
        """Keep, repeat or permute sequences, with all that is remembered about their pairs."""
        if self.is_initialized:
            groups_G = torch.arange(self.groups, device=self.device)
            head_M = (index.to(self.device)[:, None] * self.groups + groups_G).flatten()
            for name in self.memory:
                setattr(self, name, getattr(self, name)[head_M])
            self.slot_NC = self.pool.select_heads(head_M, self.slot_NC)


def to_heads(x_BX: Tensor, groups: int) -> Tensor:
    """[N, ...]: what is the same in all `groups` KV heads of a sequence."""
    return x_BX.repeat_interleave(groups, dim=0)
