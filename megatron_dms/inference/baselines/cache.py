"""The cache of a policy, and a meter for queries that may read fewer pairs than are held.

Shapes: B sequences, G KV heads, L layers, T new tokens.
"""

from collections.abc import Sequence

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
    """KVMeter for layers that report what their queries read and what they dropped."""

    per_head = (*KVMeter.per_head, "reported_reads_LBG")

    reported_reads_LBG: Tensor
    """Pairs that the last forward's last query read."""

    @property
    def latest_reads_LBG(self) -> Tensor:
        """The reads as the layers report them; KVMeter derives them from the pairs held."""
        return self.reported_reads_LBG

    def record_layer(self, layer: int, store: PolicyLayer) -> None:
        """Record what one layer dropped, read and holds after a forward, in pairs."""
        self.record_decisions(layer, store.evicted_BG)
        self.reported_reads_LBG[layer].copy_(store.read_BG)
        self.record_storage(
            layer, store.occupied_BG, store.bytes_per_pair, store.kv_bytes, store.bookkeeping_bytes
        )


class BaselineCache(DMSCache):
    """A DMSCache with the layers of a policy: it takes one prompt, and then one token at a time."""

    layers: Sequence[PolicyLayer]
    meter: PolicyMeter

    def __init__(self, num_layers: int, policy: Policy, max_new_tokens: int) -> None:
        """`max_new_tokens` may follow the prompt; prompt and new tokens set each sequence's budget."""
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
            ValueError: more than one token, or padding, comes after the prompt, or more tokens come than
                the cache was made for.
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
