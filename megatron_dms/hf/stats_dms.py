"""What a generation cost: achieved compression, KV reads, peak tokens and bytes.

A `KVMeter` belongs to one cache and only adds up tensors, so that reading costs nothing until someone asks;
`KVMeter.stats` turns the sums into a `KVStats` of plain Python numbers.

Shapes: B sequences, G KV heads, L layers.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVStats:
    """Cost of everything a cache has been through, or of the last forward without a cache.

    Lists have one entry per sequence of the batch. Tokens fed to a sequence that has already ended
    (`generate` feeds padding until the last sequence of the batch ends) count nowhere. Without a cache
    nothing is held or reread, so reads, peaks and bytes are 0 and only the decisions are reported.
    """

    achieved_cr: float | None
    """1 / (1 - evicted_fraction); None where every decision was to evict (the ratio is unbounded)."""
    evicted_fraction: float
    """Mean of alpha over layers, KV heads and tokens; pairs still waiting for their decision do not count."""
    kv_reads: list[float]
    """In pairs: what the query behind each token that `generate` produced has read, averaged over layers and
    KV heads, summed over these tokens. The first of these queries is the prompt's last token."""
    kv_reads_mean: float
    dense_kv_reads: list[int]
    """The same for a cache that keeps every pair."""
    dense_kv_reads_mean: float
    peak_tokens: list[float]
    """In pairs: the most held after any forward, averaged over layers and KV heads."""
    peak_tokens_mean: float
    tokens_seen: list[int]
    """Real tokens that went in: prompt and generated ones (the last generated token is never fed)."""
    generated_tokens: list[int]
    """Tokens that `generate` produced, an end-of-sequence token included."""
    peak_bytes: int
    """Most bytes allocated for keys and values, empty slots included, over all layers and sequences."""
    peak_bookkeeping_bytes: int
    """Bytes of page owners, slots and marks at the same moment; not part of peak_bytes."""
    dense_bytes: int
    """Bytes of keys and values in a dense cache with every sequence at the longest one's tokens_seen."""
    evicted_fraction_per_head: list[list[float]]
    """[L][G], the mean over sequences and tokens; 1 / (1 - x) is that head's compression ratio."""

    def to_dict(self, per_head: bool = False) -> dict[str, object]:
        """As JSON-ready values; the L x G table only on request."""
        entries = asdict(self)
        if not per_head:
            del entries["evicted_fraction_per_head"]
        return entries


class KVMeter:
    """Running sums behind KVStats, fed by each layer of each forward and by `generate`."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.active_B: Tensor | None = None  # False once a sequence has ended; None before the first forward
        self.evicted_LBG: list[Tensor] = []  # per layer [B, G]: decisions to evict
        self.evicted_before_LBG: list[Tensor] = []  # the same before the current forward
        self.decided_B: Tensor | None = None
        self.seen_B: Tensor | None = None
        self.held_B: Tensor | None = None  # pairs held after the last forward, summed over layers and heads
        self.peak_B: Tensor | None = None
        self.reads_B: Tensor | None = None
        self.dense_reads_B: Tensor | None = None
        self.generated_B: Tensor | None = None
        self.bytes = 0
        self.bookkeeping_bytes = 0
        self.peak_bytes = 0
        self.peak_bookkeeping_bytes = 0
        self.bytes_per_pair = 0  # keys and values of one token in one head of one layer

    @property
    def has_storage(self) -> bool:
        """Whether it has measured a cache, rather than forwards without one."""
        return self.bytes_per_pair > 0

    def restart_sequences(self) -> None:
        """Count every sequence again: a new call of `generate` continues the ended ones, too."""
        if self.active_B is not None:
            self.active_B = torch.ones_like(self.active_B)

    def start_forward(self, before_B: Tensor, count_B: Tensor, lag: int, num_heads: int) -> None:
        """Called once per forward, before any layer.

        Args:
            before_B, count_B: [B] real tokens seen before, and in, this forward.
            lag: in tokens; the first `lag` tokens of a sequence carry no decision.
            num_heads: G.
        """
        if self.active_B is None:
            zero_B = torch.zeros_like(count_B)
            self.active_B = torch.ones_like(count_B, dtype=torch.bool)
            self.evicted_LBG = [zero_B[:, None].repeat(1, num_heads) for _ in range(self.num_layers)]
            self.decided_B = self.seen_B = self.held_B = self.peak_B = zero_B
            self.reads_B = self.dense_reads_B = self.generated_B = zero_B
        total_B = before_B + count_B
        decided_B = (total_B - lag).clamp(min=0) - (before_B - lag).clamp(min=0)
        self.seen_B = self.seen_B + count_B * self.active_B
        self.decided_B = self.decided_B + decided_B * self.active_B
        self.evicted_before_LBG = list(self.evicted_LBG)
        self.held_B = torch.zeros_like(self.held_B)
        self.bytes = self.bookkeeping_bytes = 0

    def record_decisions(self, layer: int, evict_BG: Tensor) -> None:
        """Add [B, G] decisions to evict that arrived in this forward.

        To what was there before it, not to the sum: gradient checkpointing runs a layer's forward twice.
        """
        before_BG = self.evicted_before_LBG[layer].to(evict_BG.device)
        self.evicted_LBG[layer] = before_BG + evict_BG * self.active_B.to(evict_BG.device)[:, None]

    def record_storage(
        self, layer: int, held_BG: Tensor, bytes_per_pair: int, kv_bytes: int, bookkeeping_bytes: int
    ) -> None:
        """Add one layer's holdings after this forward; the last layer closes the forward."""
        self.held_B = self.held_B + held_BG.sum(dim=1).to(self.held_B.device)
        self.bytes_per_pair = bytes_per_pair
        self.bytes += kv_bytes
        self.bookkeeping_bytes += bookkeeping_bytes
        if layer == self.num_layers - 1:
            self.peak_B = torch.where(self.active_B, torch.maximum(self.peak_B, self.held_B), self.peak_B)
            if self.bytes > self.peak_bytes:
                self.peak_bytes, self.peak_bookkeeping_bytes = self.bytes, self.bookkeeping_bytes

    def count_generated(self, ended_B: Tensor | None) -> None:
        """The last forward's last query has produced a token; `ended_B` [B] says which sequences now end.

        What that query read is what is held after it: what is dropped is exactly what it could not see.
        """
        self.reads_B = self.reads_B + self.held_B * self.active_B
        self.dense_reads_B = self.dense_reads_B + self.seen_B * self.active_B
        self.generated_B = self.generated_B + self.active_B.to(self.generated_B.dtype)
        if ended_B is not None:
            self.active_B = self.active_B & ~ended_B.to(self.active_B.device)

    @property
    def rows(self) -> int | None:
        """Sequences counted; None before the first forward."""
        return None if self.active_B is None else len(self.active_B)

    def match_rows(self, rows: int) -> None:
        """Where a prompt was computed once for several sequences: from here on each of them counts."""
        if self.rows is not None and self.rows != rows:
            index = torch.arange(self.rows, device=self.active_B.device)
            self.select_sequences(index.repeat_interleave(rows // self.rows))

    def select_sequences(self, index: Tensor) -> None:
        """Follow the cache when a beam search reorders, repeats or drops sequences."""
        if self.active_B is None:
            return
        for name in (
            "active_B", "decided_B", "seen_B", "held_B", "peak_B", "reads_B", "dense_reads_B", "generated_B",
        ):  # fmt: skip
            value = getattr(self, name)
            setattr(self, name, value.index_select(0, index.to(value.device)))
        self.evicted_LBG = [part.index_select(0, index.to(part.device)) for part in self.evicted_LBG]

    def stats(self) -> KVStats | None:
        """The sums as plain numbers (synchronises with the device), or None before the first forward."""
        if self.active_B is None:
            return None
        per_head = torch.stack([part.cpu() for part in self.evicted_LBG]).double()  # [L, B, G]
        layers, _, heads = per_head.shape
        decided = int(self.decided_B.sum())
        fraction_LG = per_head.sum(dim=1) / max(decided, 1)
        fraction = float(fraction_LG.mean())
        reads = [float(x) / (layers * heads) for x in self.reads_B.tolist()]
        peaks = [float(x) / (layers * heads) for x in self.peak_B.tolist()]
        seen, dense = self.seen_B.tolist(), self.dense_reads_B.tolist()
        return KVStats(
            achieved_cr=None if fraction == 1.0 else 1.0 / (1.0 - fraction),
            evicted_fraction=fraction,
            kv_reads=reads,
            kv_reads_mean=_mean(reads),
            dense_kv_reads=dense,
            dense_kv_reads_mean=_mean(dense),
            peak_tokens=peaks,
            peak_tokens_mean=_mean(peaks),
            tokens_seen=seen,
            generated_tokens=self.generated_B.tolist(),
            peak_bytes=self.peak_bytes,
            peak_bookkeeping_bytes=self.peak_bookkeeping_bytes,
            dense_bytes=len(seen) * max(seen) * layers * heads * self.bytes_per_pair,
            evicted_fraction_per_head=fraction_LG.tolist(),
        )


def _mean(values: list) -> float:
    return sum(values) / len(values)
