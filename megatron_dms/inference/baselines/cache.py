"""The cache of a policy, and the meter that knows that reads and holdings may differ.

Shapes: B sequences, G KV heads, L layers, T new tokens.
"""

import torch
from torch import Tensor

from megatron_dms.hf.cache_dms import DMSCache
from megatron_dms.hf.sparse_attention_dms import NewTokens
from megatron_dms.hf.stats_dms import KVMeter

from .evicting import H2OLayer, TOVALayer, WindowLayer
from .layer import PolicyLayer
from .policies import H2O, TOVA, Policy, Quest, Window
from .quest import QuestLayer

LAYERS: dict[type[Policy], type[PolicyLayer]] = {
    TOVA: TOVALayer,
    H2O: H2OLayer,
    Window: WindowLayer,
    Quest: QuestLayer,
}


class PolicyMeter(KVMeter):
    """KVMeter for layers that say themselves what their queries read and what they dropped."""

    per_head = (*KVMeter.per_head, "latest_reads_LBG")
    latest_reads_LBG: Tensor | None = None  # in place of what KVMeter derives from the holdings

    def record_layer(self, layer: int, store: PolicyLayer) -> None:
        """Take down one layer after a forward: drops, reads and holdings, in pairs."""
        self.record_decisions(layer, store.evicted_BG)
        self.latest_reads_LBG[layer].copy_(store.read_BG)
        self.record_storage(
            layer, store.occupied_BG, store.bytes_per_pair, store.kv_bytes, store.bookkeeping_bytes
        )


class BaselineCache(DMSCache):
    """DMSCache with the layers of a policy: one prompt, then tokens one at a time."""

    def __init__(self, num_layers: int, policy: Policy, max_new_tokens: int) -> None:
        """`max_new_tokens` after the prompt; with the prompt's own it sets each sequence's budget."""
        super().__init__(num_layers, window=0, lag=0)
        self.layers = [LAYERS[type(policy)](policy, max_new_tokens) for _ in range(num_layers)]
        self.policy = policy
        self.max_new_tokens = max_new_tokens

    def _start_anew(self) -> None:
        super()._start_anew()
        self._most_columns: int | None = None
        self.meter = PolicyMeter(len(self.layers))

    def place(self, B: int, T: int, real_BT: Tensor | None, device: torch.device) -> NewTokens:
        """As DMSCache.place.

        Raises:
            ValueError: more than one token, or padding, after the prompt; or more tokens than it was made
            for.
        """
        if self._most_columns is None:
            self._most_columns = T + self.max_new_tokens
        if self.columns + T > self._most_columns:
            raise ValueError(
                f"this cache was made for {self.max_new_tokens} tokens after the prompt: no more can come"
            )
        if self.columns and (T > 1 or real_BT is not None):
            raise ValueError(
                f"{self.policy.name} takes the prompt in one forward and then one token for each sequence at "
                f"a time, found {T} columns{'' if real_BT is None else ' with padding'} after the prompt"
            )
        return super().place(B, T, real_BT, device)
