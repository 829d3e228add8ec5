"""One layer of the cache that forgets: which of its pairs are live, and where a new pair goes.

The position and the mark of a pair matter while the pair can still be evicted, that is, until it leaves the
window. Each head therefore has a ring of window + 1 entries, one for each of its latest tokens. An entry has
the slot and the mark of its token's pair. When a pair leaves the window, there are two cases. If the pair is
marked, the new pair takes its slot. If it is not, it stays readable by every later query, and the new pair
goes to the end of the head's pages. A step looks at two entries of the ring per head, however many pairs the
head has. Keys are stored after RoPE, so their order does not matter.

Shapes: B sequences, G KV heads, N = B * G, R = query heads per KV head, T new tokens, W = window + 1 entries
of the ring (the token at position p has entry p mod W), K pairs of the fullest head, D head size; positions
as in sparse_attention_dms.py.
"""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .page_attention_dms import page_attention
from .pages_dms import PagePool, bytes_of
from .sparse_attention_dms import NewTokens, ReadablePairs, arriving_marks, held_after


class DMSCacheLayer(CacheLayerMixin):
    """The pairs of one attention layer.

    A new layer holds no sequences. The first forward says how many there are, and in which type and on which
    device their pairs lie.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    max_cache_len = -1
    """Unlimited. PEFT asks for this name."""

    def __init__(self, window: int, lag: int, attend_with: str = "torch") -> None:
        """`window` and `lag` in tokens; `attend_with` is a name in PAGE_ATTENTION."""
        super().__init__()
        self.window = window
        self.lag = lag
        self.attend_pages = page_attention(attend_with)
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.groups = 0  # G
        self.columns = 0  # token columns seen, padding included: what transformers calls the sequence length
        self._hold(0, torch.empty(0), torch.empty(0))
        self.is_initialized = False

    def _hold(self, heads: int, key_like: Tensor, value_like: Tensor) -> None:
        """Start with no pairs for that many heads (N); the tensors [..., D] give head sizes, type and
        device."""
        self.dtype, self.device = key_like.dtype, key_like.device
        self.pool = PagePool(heads, key_like, value_like)
        self.slot_NW = torch.zeros(heads, self.window + 1, dtype=torch.int32, device=self.device)
        self.marked_NW = torch.zeros(heads, self.window + 1, dtype=torch.bool, device=self.device)

    @torch.inference_mode(False)  # see pages_dms.py
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Start with no pairs, in the shape, type and device of [B, G, T, D] states."""
        B, self.groups = key_states.shape[:2]
        self._hold(B * self.groups, key_states, key_states if value_states is None else value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "a DMS cache needs the eviction decisions beside keys and values: it works with a DMS model only"
        )

    def extend(
        self, k_BGTD: Tensor, v_BGTD: Tensor, evict_BGT: Tensor, new: NewTokens, by_pages: bool = True
    ) -> ReadablePairs | None:
        """Take in T new tokens and return what their queries may read.

        Args:
            k_BGTD, v_BGTD: keys after RoPE, and values. The cache keeps them without their gradients.
            evict_BGT: bool, the decisions these tokens carry; each concerns the pair `lag` tokens earlier.
            new: where the tokens stand; see NewTokens.
            by_pages: whether None may be returned.

        Returns:
            The pairs that the new queries may read. After a step with one token for each sequence, the query
            of each head reads exactly what the head now holds: then the result is None, and `attend`
            computes the attention.
        """
        if not self.is_initialized:
            self.lazy_initialization(k_BGTD, v_BGTD)
        held, given = (self.dtype, self.pool.values_PSD.dtype), (k_BGTD.dtype, v_BGTD.dtype)
        if held != given:
            raise ValueError(
                f"this DMS cache holds keys and values in {held}, the new ones are {given}: one cache, one "
                "type; start a new cache"
            )
        pairs = None
        # The columns are counted last: a layer whose forward failed half-way then lags behind the cache.
        if k_BGTD.shape[2] == 1 and new.column_BT is None and by_pages:
            if self.pool.sure_steps == 0:
                self.pool.make_room()
            self._step(k_BGTD, v_BGTD, evict_BGT, new)
            self.count_step()
        else:
            pairs = self._chunk(k_BGTD, v_BGTD, evict_BGT, new)
            self.columns += k_BGTD.shape[2]
        return pairs

    def count_step(self) -> None:
        """Count a step with one token: this is all that the step changes on the host."""
        self.pool.sure_steps -= 1
        self.columns += 1

    def attend(self, q_BHTD: Tensor, scale: float) -> Tensor:
        """[B, H, 1, D]: the attention of one query per head over all pairs held."""
        B, H, _, D = q_BHTD.shape
        q_NRD = q_BHTD.reshape(B * self.groups, -1, D)
        pool = self.pool
        out_NRD = self.attend_pages(q_NRD, pool.keys_PSD, pool.values_PSD, pool.owner_P, pool.fill_P, scale)
        return out_NRD.reshape(B, H, 1, -1)

    def _step(self, k_BG1D: Tensor, v_BG1D: Tensor, evict_BG1: Tensor, new: NewTokens) -> None:
        """Take in one token for each sequence: mark, evict, and store the new pair.

        The new pair goes into the slot of the evicted pair, or to the end. Everything happens in place, and
        the host waits for nothing from the device, so a CUDA graph can replay the step.
        """
        W = self.window + 1
        evict_N1 = evict_BG1.reshape(-1, 1)
        position_N1 = new.position_BT.repeat_interleave(self.groups, dim=0)
        if self.lag:
            # The pair decided now is in the ring, as lag <= W. Where there is no such pair yet (position <
            # lag), this is the entry of a token still to come, and that token will overwrite it.
            self.marked_NW.scatter_(1, (position_N1 - self.lag) % W, evict_N1)
        # The pair that leaves the window came W tokens ago, and the new pair takes over its entry.
        entry_N1 = position_N1 % W
        reuse_N = (self.marked_NW.gather(1, entry_N1) & (position_N1 >= W))[:, 0]
        slot_N = self.pool.take_one(reuse_N, self.slot_NW.gather(1, entry_N1)[:, 0].long())
        self.pool.write(slot_N, k_BG1D.flatten(0, 2), v_BG1D.flatten(0, 2))
        self.slot_NW.scatter_(1, entry_N1, slot_N[:, None].int())
        self.marked_NW.scatter_(1, entry_N1, evict_N1 if self.lag == 0 else torch.zeros_like(evict_N1))

    def _chunk(self, k_BGTD: Tensor, v_BGTD: Tensor, evict_BGT: Tensor, new: NewTokens) -> ReadablePairs:
        """Take in many tokens, or padding: all old and new pairs may be read, and the live ones are kept."""
        W = self.window + 1
        # Entry e has the latest position that is e modulo W. It is negative where there is no such token yet.
        latest_N1 = (new.before_B - 1).repeat_interleave(self.groups)[:, None]
        position_NW = latest_N1 - (latest_N1 - torch.arange(W, device=self.device)) % W
        position_NW = position_NW.clamp(min=-1)
        position_BGW = position_NW.unflatten(0, (-1, self.groups))
        self.marked_NW |= arriving_marks(evict_BGT, new, position_BGW, self.lag).flatten(0, 1)
        old = self._old_pairs(position_NW)
        fresh = fresh_pairs(k_BGTD, v_BGTD, evict_BGT, new, self.lag)
        pairs = ReadablePairs(*(torch.cat(parts, dim=2) for parts in zip(old, fresh, strict=True)))
        self._keep(fresh, position_NW, new)
        return pairs

    def _old_pairs(self, position_NW: Tensor) -> ReadablePairs:
        """Everything held, padded to the fullest head.

        A pair older than the window gets position 0 and no mark, so that every query may read it.
        """
        pool = self.pool
        slot_NK, exists_NK = pool.slots_by_head()
        slots = pool.keys_PSD.shape[0] * pool.keys_PSD.shape[1]
        in_ring_NW = position_NW >= 0
        ring_slot_X = self.slot_NW[in_ring_NW].long()
        position_X = torch.zeros(slots, dtype=torch.int64, device=self.device)
        position_X[ring_slot_X] = position_NW[in_ring_NW]
        marked_X = torch.zeros(slots, dtype=torch.bool, device=self.device)
        marked_X[ring_slot_X] = self.marked_NW[in_ring_NW]
        # A missing pair is read from a page of another head. It becomes 0: a NaN would get through the masks.
        absent_NK1 = ~exists_NK[..., None]
        parts_NK = (
            pool.keys_PSD.flatten(0, 1)[slot_NK].masked_fill_(absent_NK1, 0),
            pool.values_PSD.flatten(0, 1)[slot_NK].masked_fill_(absent_NK1, 0),
            position_X[slot_NK].masked_fill(~exists_NK, -1),
            marked_X[slot_NK],
        )
        return ReadablePairs(*(part.unflatten(0, (-1, self.groups)) for part in parts_NK))

    def _keep(self, fresh: ReadablePairs, position_NW: Tensor, new: NewTokens) -> None:
        """Store the new pairs that are still held after this forward, first in the slots of evicted pairs.

        At least as many pairs are stored as are evicted, since a head's number of pairs never falls.
        """
        W = self.window + 1
        last_B = new.before_B + new.count_B - 1
        by_head = (-1, self.groups)
        held_BGW = held_after(
            position_NW.unflatten(0, by_head), self.marked_NW.unflatten(0, by_head), last_B, self.window
        )
        freed_NW = (position_NW >= 0) & ~held_BGW.flatten(0, 1)
        freed_N1 = freed_NW.sum(dim=1, keepdim=True)
        kept_NT = held_after(fresh.position_BGK, fresh.marked_BGK, last_B, self.window).flatten(0, 1)
        nth_NT = kept_NT.cumsum(dim=1) - 1
        more_N = kept_NT.sum(dim=1) - freed_N1[:, 0]
        index_NT = self.pool.count_N[:, None] + nth_NT - freed_N1
        freed_first_NW = self.slot_NW.gather(1, torch.argsort((~freed_NW).int(), dim=1, stable=True)).long()
        slot_NT = torch.where(
            nth_NT < freed_N1,
            freed_first_NW.gather(1, nth_NT.clamp(0, W - 1)),
            self.pool.take_many(more_N, index_NT),
        )
        self.pool.write(
            slot_NT[kept_NT], fresh.k_BGKD.flatten(0, 1)[kept_NT], fresh.v_BGKD.flatten(0, 1)[kept_NT]
        )
        position_NT = fresh.position_BGK.flatten(0, 1)
        recent_NT = (position_NT >= 0) & (position_NT > last_B.repeat_interleave(self.groups)[:, None] - W)
        entry_NT = torch.where(recent_NT, position_NT % W, W)  # older tokens go to a column that is cut off
        _scatter(self.slot_NW, entry_NT, slot_NT.int())
        _scatter(self.marked_NW, entry_NT, fresh.marked_BGK.flatten(0, 1))

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that live from step to step."""
        return (*self.pool.state, self.slot_NW, self.marked_NW)

    @property
    def held_BG(self) -> Tensor:
        """[B, G] int64: pairs held now."""
        return self.pool.count_N.unflatten(0, (-1, self.groups))

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, empty slots included."""
        return self.pool.kv_bytes

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes of everything else: page owners, slots and marks."""
        return self.pool.bookkeeping_bytes + bytes_of(self.slot_NW) + bytes_of(self.marked_NW)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """transformers 5 passes the number of new tokens, 4.57 their positions [T]."""
        length = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.columns + length, 0

    def get_seq_length(self) -> int:
        """Token columns seen, not pairs held: transformers derives position ids from this number."""
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length in transformers 4.57."""
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
        """Keep, repeat or permute sequences: sequence b of the result is sequence `index[b]` of today."""
        if self.is_initialized:
            groups_G = torch.arange(self.groups, device=self.device)
            head_M = (index.to(self.device)[:, None] * self.groups + groups_G).flatten()
            self.slot_NW = self.pool.select_heads(head_M, self.slot_NW[head_M].long()).int()
            self.marked_NW = self.marked_NW[head_M]


def fresh_pairs(k_BGTD: Tensor, v_BGTD: Tensor, evict_BGT: Tensor, new: NewTokens, lag: int) -> ReadablePairs:
    """The T new tokens as pairs; those that this forward already decides to evict are marked."""
    position_BGT = new.position_BT[:, None].expand(evict_BGT.shape)
    marked_BGT = arriving_marks(evict_BGT, new, position_BGT, lag)
    return ReadablePairs(k_BGTD, v_BGTD, position_BGT, marked_BGT)


def _scatter(ring_NW: Tensor, entry_NT: Tensor, value_NT: Tensor) -> None:
    """Write values at entries 0 to W - 1 of the ring; values for entry W are dropped."""
    ring_NW.copy_(torch.nn.functional.pad(ring_NW, (0, 1)).scatter_(1, entry_NT, value_NT)[:, :-1])
