"""The KV cache that forgets: only live pairs are stored, and each KV head keeps its own number of them.

`generate` makes one by itself; to continue a conversation pass it back:

    cache = model.make_cache()
    model.generate(**inputs, past_key_values=cache)  # cache=cache from transformers 5.24 on

cache_layer_dms.py says how pairs are kept and dropped, and pages_dms.py where they lie.

Shapes: B sequences, T new tokens.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.cache_utils import Cache

from .cache_layer_dms import DMSCacheLayer
from .sparse_attention_dms import NewTokens
from .stats_dms import KVMeter

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls a model's cache, from 5.24 on and before."""
CACHE_NAME = next(name for name in CACHE_NAMES if name in signature(LlamaModel.forward).parameters)
"""The name in this transformers; every family served here has the same."""


class DMSCache(Cache):
    """The layers, the number of real tokens of each sequence, and the meter that counts the cost.

    A new cache holds no sequences. The first forward says how many there are.

    While `copies` is n > 1, each sequence of the cache stands for n consecutive sequences of the batch, which
    have been the same so far: `generate` computes a prompt once, however many sequences follow from it.
    """

    layers: Sequence[DMSCacheLayer]  # type: ignore[assignment]  # a list of any layers there

    def __init__(self, num_layers: int, window: int, lag: int, attend_with: str = "torch") -> None:
        """`window` and `lag` in tokens, as in DMSSettings; `attend_with` is a name in PAGE_ATTENTION."""
        super().__init__(layers=[DMSCacheLayer(window, lag, attend_with) for _ in range(num_layers)])
        self.window = window
        self.lag = lag
        self._start_anew()

    def _start_anew(self) -> None:
        self._seen_B = torch.zeros(0, dtype=torch.int64)  # changes in place
        self.copies = 1
        self.columns = 0
        self.autocast: torch.dtype | None = None  # of the forwards so far
        self.follows_beams = (
            False  # whether the rows are the beams of a beam search, in the search's own order
        )
        self._moving = False
        self.meter = KVMeter(len(self.layers))

    @property
    def seen_B(self) -> Tensor:
        """[B] int64: real tokens that each sequence has had, which is the position of its next token.

        This is a copy, so that it can be passed as position_ids to the forward that counts on.
        """
        return self._seen_B.clone()

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Every tensor that lives from step to step.

        A forward with one token for each sequence, without a mask, changes them in place, unless `make_room`
        is due.
        """
        return (self._seen_B, *self.meter.state, *(part for layer in self.layers for part in layer.state))

    def make_room(self, steps: int) -> bool:
        """Provide pages for whatever the next step with one token for each sequence appends.

        A forward does this by itself. Where one layer has to grow, all layers get room for `steps` more
        tokens, so that no other layer has to grow soon. The host waits for the device only where the free
        pages that it knows of may run out.

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
        """Count a step with one token for each sequence that a CUDA graph replays."""
        self.columns += 1
        for layer in self.layers:
            layer.count_step()

    def refuse_if_broken(self) -> None:
        """
        Raises:
            RuntimeError: a forward or a selection of sequences broke off, so that some layers have finished
                it and others have not.
        """
        if self._moving or any(layer.columns != self.columns for layer in self.layers):
            raise RuntimeError(
                "this DMS cache is unusable: an earlier forward with it failed part of the way (out of "
                "memory?). Delete it, or call its reset(), and start again from the prompt"
            )

    def refuse_other_batch(self, B: int) -> None:
        """Raises ValueError if the cache holds another number of sequences."""
        if (self.columns or len(self._seen_B)) and len(self._seen_B) != B:
            raise ValueError(f"this DMS cache holds {len(self._seen_B)} sequences, the input has {B}")

    def give_up(self) -> None:
        """Declare the cache unusable until it is reset."""
        self._moving = True

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Context in which the cache counts as broken: it stays broken if the body raises."""
        self._moving = True
        yield
        self._moving = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "DMSCache":
        with torch.inference_mode(False):  # see pages_dms.py
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def place(self, B: int, T: int, real_BT: Tensor | None, device: torch.device) -> NewTokens:
        """Give the T new columns their positions, and count them: once per forward, before any layer."""
        if not len(self._seen_B):
            with torch.inference_mode(False):  # see pages_dms.py
                self._seen_B = torch.zeros(B, dtype=torch.int64, device=device)
        new = NewTokens.place(self.seen_B, T, real_BT)
        self.columns += T  # counted first: from here on a forward that breaks off leaves the layers behind
        self._seen_B += new.count_B
        return new

    def reset(self) -> None:
        super().reset()
        self._start_anew()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        index = torch.arange(len(self._seen_B) * self.copies, device=self._seen_B.device)
        self.batch_select_indices(index.repeat_interleave(repeats))

    def fork(self) -> None:
        """Give each of the `copies` of a sequence its own pairs."""
        if self.copies > 1:
            self.batch_repeat_interleave(1)
        self.copies = 1

    @torch.inference_mode(False)
    def batch_select_indices(self, indices: Tensor) -> None:
        self.refuse_if_broken()
        if not len(self._seen_B):
            return
        indices = indices.to(self._seen_B.device)
        with self.moving():  # broken until the layers, the counts and the meter have all moved
            self.meter.match_rows(len(self._seen_B) * self.copies)
            stored = indices // self.copies
            if not torch.equal(stored, torch.arange(len(self._seen_B), device=stored.device)):
                for layer in self.layers:
                    layer.select_sequences(stored)
                self._seen_B = self._seen_B.index_select(0, stored)
            self.meter.select_sequences(indices)
            self.copies = 1


def rename_cache(inputs: dict[str, Any]) -> None:
    """Put the cache among the inputs of a model under CACHE_NAME, whichever name the caller gave it.

    Raises:
        ValueError: there is a cache under both names.
    """
    refuse_two_caches(inputs)
    given = [inputs.pop(name, None) for name in CACHE_NAMES]
    inputs[CACHE_NAME] = next((cache for cache in given if cache is not None), None)


def refuse_two_caches(inputs: dict[str, Any]) -> None:
    """Refuse a cache under each of its two names: transformers 5.24 would drop one.

    Prefix tuning (PEFT) puts its own cache beside that of `generate`.

    Raises:
        ValueError: there is a cache under both names.
    """
    if all(inputs.get(name) is not None for name in CACHE_NAMES):
        raise ValueError(
            f"{' and '.join(CACHE_NAMES)} are two names of one argument, and both are given; give one of "
            "them (prefix tuning, which brings a cache of its own, is not supported by DMS models)"
        )
