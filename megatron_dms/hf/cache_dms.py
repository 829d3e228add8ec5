"""The KV cache that forgets: only live pairs are stored, and each KV head keeps its own number of them.

`generate` makes one by itself; to continue a conversation pass it back:

    cache = model.make_cache()
    model.generate(**inputs, past_key_values=cache)

How pairs are kept and dropped is in cache_layer_dms.py, where they lie in pages_dms.py.

Shapes: B sequences, T new tokens.
"""

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
        self.seen_B: Tensor | None = None
        self.copies = 1
        self.columns = 0
        self._moving = False
        self.meter = KVMeter(len(self.layers))

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

    def place(self, B: int, T: int, real_BT: Tensor | None, device: torch.device) -> NewTokens:
        """Give the T new columns their positions, and count them; once per forward, before any layer."""
        if self.seen_B is None:
            self.seen_B = torch.zeros(B, dtype=torch.int64, device=device)
        if self.seen_B.shape[0] != B:
            raise ValueError(f"this DMS cache holds {self.seen_B.shape[0]} sequences, the input has {B}")
        new = NewTokens.place(self.seen_B, T, real_BT)
        self.columns += T  # first: from here on a forward that breaks off leaves the layers behind
        self.seen_B = new.before_B + new.count_B
        return new

    def reset(self) -> None:
        super().reset()
        self._start_anew()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen_B is not None:
            index = torch.arange(self.seen_B.shape[0] * self.copies, device=self.seen_B.device)
            self.batch_select_indices(index.repeat_interleave(repeats))

    def fork(self) -> None:
        """Give each of the `copies` a sequence of its own."""
        if self.copies > 1:
            self.batch_repeat_interleave(1)
        self.copies = 1

    def batch_select_indices(self, indices: Tensor) -> None:
        self.refuse_if_broken()
        if self.seen_B is None:
            return
        indices = indices.to(self.seen_B.device)
        self._moving = True  # until layers, counts and meter have all moved
        self.meter.match_rows(len(self.seen_B) * self.copies)
        stored = indices // self.copies
        if not torch.equal(stored, torch.arange(len(self.seen_B), device=stored.device)):
            for layer in self.layers:
                layer.select_sequences(stored)
            self.seen_B = self.seen_B.index_select(0, stored)
        self.meter.select_sequences(indices)
        self.copies = 1
        self._moving = False
