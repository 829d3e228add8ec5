"""The KV cache that forgets: only live pairs are stored, and each KV head keeps its own number of them.

`generate` makes one by itself; to continue a conversation pass it back:

    cache = model.make_cache()
    model.generate(**inputs, past_key_values=cache)

How pairs are kept and dropped is in cache_layer_dms.py, where they lie in pages_dms.py.

Shapes: B sequences, T new tokens.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache_layer_dms import DMSCacheLayer
from .sparse_attention_dms import NewTokens
from .stats_dms import KVMeter


class DMSCache(Cache):
    """The layers, how many real tokens each sequence has had, and the meter that counts what it costs.

    While `copies` is n > 1, each sequence held stands for n consecutive ones of the batch, which have been
    the same so far: `generate` computes a prompt once, however many sequences are to follow from it.
    """

    def __init__(self, num_layers: int, window: int, lag: int, attend_with: str = "torch") -> None:
        """`window` and `lag` in tokens, as in DMSSettings; `attend_with` is a name in PAGE_ATTENTION."""
        super().__init__(layers=[DMSCacheLayer(window, lag, attend_with) for _ in range(num_layers)])
        self.window = window
        self.lag = lag
        self._start_anew()

    def _start_anew(self) -> None:
        self._seen_B: Tensor | None = None  # changes in place
        self.copies = 1
        self.columns = 0
        self.follows_beams = False  # its rows are a beam search's, in an order of its own
        self._moving = False
        self.meter = KVMeter(len(self.layers))

    @property
    def seen_B(self) -> Tensor | None:
        """[B] int64: real tokens each sequence has had, the position of its next one; None before the first.

        A copy, so that it may be passed as position_ids to the forward that counts on.
        """
        return None if self._seen_B is None else self._seen_B.clone()

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Every tensor that lives from step to step (of a cache that is not empty). A forward with one token
        each, without a mask, changes them in place, unless `make_room` is due."""
        return (self._seen_B, *self.meter.state, *(part for layer in self.layers for part in layer.state))

    def make_room(self, steps: int) -> bool:
        """See to pages for whatever the next step with one token each appends; a forward does so by itself.

        Where one layer has to grow, all are given room for `steps` more, so that this does not happen again
        soon in another one. Asks the device only where the known free pages may run out.

        Returns:
            Whether pages have moved.
        """
        self.refuse_if_broken()
        pools = [layer.pool for layer in self.layers if layer.is_initialized]
        with self.moving():  # a growth that breaks off leaves keys and values of different sizes
            moved = any([pool.make_room() for pool in pools if pool.sure_steps == 0])
            if moved:
                for pool in pools:
                    pool.make_room(steps)
        return moved

    def count_step(self) -> None:
        """What a step with one token each changes on the host, for one that a CUDA graph replays."""
        self.columns += 1
        for layer in self.layers:
            layer.count_step()

    def refuse_if_broken(self) -> None:
        """
        Raises:
            RuntimeError: a forward or a selection of sequences did not come to its end, so that some layers
                have it behind them and others not.
        """
        if self._moving or any(layer.columns != self.columns for layer in self.layers):
            raise RuntimeError(
                "this DMS cache is unusable: an earlier forward with it failed part of the way (out of "
                "memory?). Delete it, or call its reset(), and start again from the prompt"
            )

    def refuse_other_batch(self, B: int) -> None:
        """Raises ValueError if the cache holds another number of sequences."""
        if self._seen_B is not None and len(self._seen_B) != B:
            raise ValueError(f"this DMS cache holds {len(self._seen_B)} sequences, the input has {B}")

    def give_up(self) -> None:
        """Call it unusable, until it is reset."""
        self._moving = True

    @contextmanager
    def moving(self) -> Iterator[None]:
        """If what is within breaks off, the cache is broken."""
        self._moving = True
        yield
        self._moving = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "DMSCache":
        with torch.inference_mode(False):  # see pages_dms.py
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def place(self, B: int, T: int, real_BT: Tensor | None, device: torch.device) -> NewTokens:
        """Give the T new columns their positions, and count them; once per forward, before any layer."""
        if self._seen_B is None:
            with torch.inference_mode(False):  # see pages_dms.py
                self._seen_B = torch.zeros(B, dtype=torch.int64, device=device)
        new = NewTokens.place(self.seen_B, T, real_BT)
        self.columns += T  # first: from here on a forward that breaks off leaves the layers behind
        self._seen_B += new.count_B
        return new

    def reset(self) -> None:
        super().reset()
        self._start_anew()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._seen_B is not None:
            index = torch.arange(len(self._seen_B) * self.copies, device=self._seen_B.device)
            self.batch_select_indices(index.repeat_interleave(repeats))

    def fork(self) -> None:
        """Give each of the `copies` a sequence of its own."""
        if self.copies > 1:
            self.batch_repeat_interleave(1)
        self.copies = 1

    @torch.inference_mode(False)
    def batch_select_indices(self, indices: Tensor) -> None:
        self.refuse_if_broken()
        if self._seen_B is None:
            return
        indices = indices.to(self._seen_B.device)
        with self.moving():  # until layers, counts and meter have all moved
            self.meter.match_rows(len(self._seen_B) * self.copies)
            stored = indices // self.copies
            if not torch.equal(stored, torch.arange(len(self._seen_B), device=stored.device)):
                for layer in self.layers:
                    layer.select_sequences(stored)
                self._seen_B = self._seen_B.index_select(0, stored)
            self.meter.select_sequences(indices)
            self.copies = 1
