"""The KV cache that forgets: only live pairs are stored, and each KV head keeps its own number of them.

A reference in plain torch. Per layer, pairs lie in slots [B, G, S]; a new pair takes the slot of one that was
evicted in the same step, and S grows only when some head has no free slot left. Keys are stored after RoPE,
so the order of slots does not matter. `generate` makes one by itself; to continue a conversation pass it
back:

    cache = model.make_cache()
    model.generate(**inputs, past_key_values=cache)

Shapes: B sequences, G KV heads, T new tokens, S slots, D head size; positions as in sparse_attention_dms.py.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .sparse_attention_dms import NewTokens, ReadablePairs, arriving_marks, held_after
from .stats_dms import KVMeter

MIN_GROWTH = 16
"""Slots added at a time, at least (else an eighth of what is there): copying on every step would be slow."""


class DMSCacheLayer(CacheLayerMixin):
    """Slots of one attention layer. `keys` and `values` are [B, G, S, D]."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, window: int, lag: int) -> None:
        super().__init__()
        self.window = window
        self.lag = lag
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.position_BGS: Tensor | None = None
        self.marked_BGS: Tensor | None = None
        self.is_initialized = False
        self.columns = 0  # token columns seen, padding included: what transformers calls the sequence length
        self._free_at_least = 0  # free slots every head is known to have, to ask the device seldom

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Start with no slots, in the shape, type and device of [B, G, T, D] states."""
        B, G, _, D = key_states.shape
        value_size = D if value_states is None else value_states.shape[-1]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(B, G, 0, D)
        self.values = key_states.new_zeros(B, G, 0, value_size)
        self.position_BGS = torch.zeros(B, G, 0, dtype=torch.int64, device=self.device)
        self.marked_BGS = torch.zeros(B, G, 0, dtype=torch.bool, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "a DMS cache needs the eviction decisions beside keys and values: it goes with a DMS model only"
        )

    def extend(self, k_BGTD: Tensor, v_BGTD: Tensor, evict_BGT: Tensor, new: NewTokens) -> ReadablePairs:
        """Take in T new tokens and return what their queries may read.

        Args:
            k_BGTD, v_BGTD: keys after RoPE, and values.
            evict_BGT: bool, the decisions these tokens carry; each concerns the pair `lag` tokens earlier.
            new: where the tokens stand; see NewTokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(k_BGTD, v_BGTD)
        self.columns += k_BGTD.shape[2]
        self.marked_BGS |= arriving_marks(evict_BGT, new, self.position_BGS, self.lag)
        if k_BGTD.shape[2] == 1 and new.column_BT is None:
            return self._step(k_BGTD, v_BGTD, evict_BGT, new)
        return self._chunk(k_BGTD, v_BGTD, evict_BGT, new)

    def _step(self, k_BG1D: Tensor, v_BG1D: Tensor, evict_BG1: Tensor, new: NewTokens) -> ReadablePairs:
        """One token each: evict, put the new pair into a free slot, read what is in the slots."""
        held_BGS = held_after(self.position_BGS, self.marked_BGS, new.position_BT[:, 0], self.window)
        self.position_BGS.masked_fill_(~held_BGS, -1)
        self._make_room()
        slot_BG1 = (self.position_BGS < 0).int().argmax(dim=2, keepdim=True)
        position_BG1 = new.position_BT[:, None].expand_as(slot_BG1)
        self.position_BGS.scatter_(2, slot_BG1, position_BG1)
        self.marked_BGS.scatter_(2, slot_BG1, arriving_marks(evict_BG1, new, position_BG1, self.lag))
        self.keys.scatter_(2, slot_BG1[..., None].expand_as(k_BG1D), k_BG1D)
        self.values.scatter_(2, slot_BG1[..., None].expand_as(v_BG1D), v_BG1D)
        return ReadablePairs(self.keys, self.values, self.position_BGS, self.marked_BGS)

    def _make_room(self) -> None:
        """Every head gets a free slot. Asks the device for their number only when the known ones are used."""
        if self._free_at_least == 0:
            self._free_at_least = self._fewest_free()
        if self._free_at_least == 0:
            slots = self.position_BGS.shape[2]
            self._resize(slots + max(MIN_GROWTH, slots // 8))
            self._free_at_least = self._fewest_free()
        self._free_at_least -= 1

    def _fewest_free(self) -> int:
        return int((self.position_BGS < 0).sum(dim=2).min()) if self.position_BGS.shape[2] else 0

    def _resize(self, slots: int) -> None:
        extra = slots - self.position_BGS.shape[2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))
        self.position_BGS = torch.nn.functional.pad(self.position_BGS, (0, extra), value=-1)
        self.marked_BGS = torch.nn.functional.pad(self.marked_BGS, (0, extra))

    def _chunk(self, k_BGTD: Tensor, v_BGTD: Tensor, evict_BGT: Tensor, new: NewTokens) -> ReadablePairs:
        """Many tokens (or padding among them): read old slots and all new pairs, keep the live ones."""
        fresh = fresh_pairs(k_BGTD, v_BGTD, evict_BGT, new, self.lag)
        pairs = ReadablePairs(
            torch.cat([self.keys, fresh.k_BGKD], dim=2),
            torch.cat([self.values, fresh.v_BGKD], dim=2),
            torch.cat([self.position_BGS, fresh.position_BGK], dim=2),
            torch.cat([self.marked_BGS, fresh.marked_BGK], dim=2),
        )
        last_B = new.before_B + new.count_B - 1
        held_BGK = held_after(pairs.position_BGK, pairs.marked_BGK, last_B, self.window)
        count_BG = held_BGK.sum(dim=2)
        slots = max(int(count_BG.max()), self.position_BGS.shape[2])
        source_BGS = torch.argsort((~held_BGK).int(), dim=2, stable=True)[:, :, :slots]  # held pairs first
        self.keys = pairs.k_BGKD.gather(2, _across(source_BGS, k_BGTD))
        self.values = pairs.v_BGKD.gather(2, _across(source_BGS, v_BGTD))
        empty_BGS = torch.arange(slots, device=count_BG.device) >= count_BG[..., None]
        self.position_BGS = pairs.position_BGK.gather(2, source_BGS).masked_fill(empty_BGS, -1)
        self.marked_BGS = pairs.marked_BGK.gather(2, source_BGS)
        self._free_at_least = 0
        return pairs

    @property
    def held_BG(self) -> Tensor:
        """[B, G] int64: pairs held now."""
        return (self.position_BGS >= 0).sum(dim=2)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, empty slots included."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def bookkeeping_bytes(self) -> int:
        return self.position_BGS.nbytes + self.marked_BGS.nbytes

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """transformers 5 passes the number of new tokens, 4.57 their positions [T]."""
        length = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.columns + length, 0

    def get_seq_length(self) -> int:
        """Token columns seen, not pairs held: transformers derives position ids from it."""
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """Name of get_max_length in transformers 4.57."""
        return -1

    def reset(self) -> None:
        self._forget_everything()

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError(
            "a DMS cache cannot be cropped: evicted pairs are gone. Start again from the prompt, and "
            "generate without an assistant model"
        )

    def offload(self) -> None:
        raise NotImplementedError("a DMS cache cannot be offloaded; use cache_implementation=None")

    def select_sequences(self, index: Tensor) -> None:
        """Keep, repeat or permute sequences: the B dimension becomes `index` [B']."""
        if self.is_initialized:
            index = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
            self.position_BGS = self.position_BGS.index_select(0, index)
            self.marked_BGS = self.marked_BGS.index_select(0, index)


class DMSCache(Cache):
    """The layers, how many real tokens each sequence has had, and the meter that counts what it costs."""

    def __init__(self, num_layers: int, window: int, lag: int) -> None:
        """`window` and `lag` in tokens, as in DMSSettings."""
        super().__init__(layers=[DMSCacheLayer(window, lag) for _ in range(num_layers)])
        self.window = window
        self.lag = lag
        self.seen_B: Tensor | None = None
        self.meter = KVMeter(num_layers)

    def place(self, B: int, T: int, real_BT: Tensor | None, device: torch.device) -> NewTokens:
        """Give the T new columns their positions, and count them; once per forward, before any layer."""
        if self.seen_B is None:
            self.seen_B = torch.zeros(B, dtype=torch.int64, device=device)
        if self.seen_B.shape[0] != B:
            raise ValueError(f"this DMS cache holds {self.seen_B.shape[0]} sequences, the input has {B}")
        new = NewTokens.place(self.seen_B, T, real_BT)
        self.seen_B = new.before_B + new.count_B
        return new

    def reset(self) -> None:
        super().reset()
        self.seen_B = None
        self.meter = KVMeter(len(self.layers))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen_B is not None:
            index = torch.arange(self.seen_B.shape[0], device=self.seen_B.device)
            self.batch_select_indices(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.select_sequences(indices)
        if self.seen_B is not None:
            self.seen_B = self.seen_B.index_select(0, indices.to(self.seen_B.device))
        self.meter.select_sequences(indices)


def fresh_pairs(k_BGTD: Tensor, v_BGTD: Tensor, evict_BGT: Tensor, new: NewTokens, lag: int) -> ReadablePairs:
    """The T new tokens as pairs, marked as far as this forward already decides them."""
    position_BGT = new.position_BT[:, None].expand(evict_BGT.shape)
    marked_BGT = arriving_marks(evict_BGT, new, position_BGT, lag)
    return ReadablePairs(k_BGTD, v_BGTD, position_BGT, marked_BGT)


def _across(index_BGS: Tensor, like_BGTD: Tensor) -> Tensor:
    """`index_BGS` repeated over the last dimension of `like_BGTD`, for gather."""
    return index_BGS[..., None].expand(*index_BGS.shape, like_BGTD.shape[-1])
