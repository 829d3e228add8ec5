"""What a generation cost: achieved compression, KV reads, peak tokens and bytes.

A `KVMeter` belongs to one cache and only adds up tensors, so that reading costs nothing until someone asks;
`KVMeter.stats` turns the sums into a `KVStats` of plain Python numbers. The tensors change in place, for the
reasons in pages_dms.py.

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
    kv_reads_per_head: list[list[float]]
    """[L][G], in pairs: the same reads by head, the mean over sequences; kv_reads_mean is the mean of it."""
    peak_tokens_per_head: list[list[float]]
    """[L][G], in pairs: the most each head held, the mean over sequences; peak_tokens_mean is the mean of it.
    (No head of a sequence ever holds fewer pairs than before: all peak together, at its last token.)"""

    def to_dict(self, per_head: bool = False) -> dict[str, object]:
        """As JSON-ready values; the L x G tables only on request."""
        return {
            name: value for name, value in asdict(self).items() if per_head or not name.endswith("_per_head")
        }


PER_SEQUENCE = ("active_B", "decided_B", "seen_B", "dense_reads_B", "generated_B")
PER_HEAD = ("arrived_LBG", "evicted_LBG", "held_LBG", "peak_LBG", "reads_LBG")


class KVMeter:
    """Running sums behind KVStats, fed by each layer of each forward and by `generate`.

    A new meter counts no sequences. The first forward says how many there are.
    """

    per_head: tuple[str, ...] = PER_HEAD
    """Names of its [L, B, G] tensors."""

    active_B: Tensor
    """bool: False once the sequence has ended."""
    decided_B: Tensor
    """Tokens whose decision has arrived."""
    seen_B: Tensor
    """Real tokens that went in."""
    dense_reads_B: Tensor
    """Pairs that a cache which keeps everything would have read."""
    generated_B: Tensor
    """Tokens that `generate` has produced."""
    arrived_LBG: Tensor
    """Decisions to evict that arrived in the last forward."""
    evicted_LBG: Tensor
    """Decisions to evict that arrived in earlier forwards."""
    held_LBG: Tensor
    """Pairs held after the last forward."""
    peak_LBG: Tensor
    """Most pairs held after any forward."""
    reads_LBG: Tensor
    """Pairs read by the queries behind the generated tokens."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._count(0, 0, torch.device("cpu"))
        self.bytes = 0
        self.bookkeeping_bytes = 0
        self.peak_bytes = 0
        self.peak_bookkeeping_bytes = 0
        self.bytes_per_pair = 0  # keys and values of one token in one head of one layer

    @torch.inference_mode(False)  # see pages_dms.py
    def _count(self, B: int, G: int, device: torch.device) -> None:
        """Start every sum at 0, for B active sequences with G KV heads in each layer."""
        self.active_B = torch.ones(B, dtype=torch.bool, device=device)
        for name in PER_SEQUENCE[1:]:
            setattr(self, name, torch.zeros(B, dtype=torch.int64, device=device))
        for name in self.per_head:
            setattr(self, name, torch.zeros(self.num_layers, B, G, dtype=torch.int64, device=device))

    @property
    def rows(self) -> int:
        """Sequences counted; 0 before the first forward."""
        return len(self.active_B)

    @property
    def has_storage(self) -> bool:
        """Whether a cache has been measured, rather than forwards without one."""
        return self.bytes_per_pair > 0

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that live from step to step."""
        return tuple(getattr(self, name) for name in PER_SEQUENCE + self.per_head)

    def restart_sequences(self) -> None:
        """Count every sequence again: a new call of `generate` also continues the sequences that ended."""
        self.active_B.fill_(True)

    def start_forward(self, before_B: Tensor, count_B: Tensor, lag: int, num_heads: int) -> None:
        """Called once per forward, before any layer.

        Args:
            before_B, count_B: [B] real tokens seen before, and in, this forward.
            lag: in tokens; the first `lag` tokens of a sequence carry no decision.
            num_heads: G.
        """
        if not self.rows:
            self._count(len(count_B), num_heads, count_B.device)
        total_B = before_B + count_B
        decided_B = (total_B - lag).clamp(min=0) - (before_B - lag).clamp(min=0)
        self.seen_B += count_B * self.active_B
        self.decided_B += decided_B * self.active_B
        self.evicted_LBG += self.arrived_LBG
        self.arrived_LBG.zero_()
        self.bytes = self.bookkeeping_bytes = 0

    def record_decisions(self, layer: int, evict_BG: Tensor) -> None:
        """Take down [B, G] decisions to evict that arrived in this forward.

        Beside the sum, not in it: gradient checkpointing runs a layer's forward twice.
        """
        self.arrived_LBG[layer].copy_(evict_BG.to(self.active_B.device) * self.active_B[:, None])

    def record_storage(
        self, layer: int, held_BG: Tensor, bytes_per_pair: int, kv_bytes: int, bookkeeping_bytes: int
    ) -> None:
        """Take down one layer's holdings after this forward; the last layer closes the forward."""
        self.held_LBG[layer].copy_(held_BG)
        self.bytes_per_pair = bytes_per_pair
        self.bytes += kv_bytes
        self.bookkeeping_bytes += bookkeeping_bytes
        if layer == self.num_layers - 1:
            # No maximum is needed: a head never holds fewer pairs than before.
            self.peak_LBG.copy_(torch.where(self.active_B[:, None], self.held_LBG, self.peak_LBG))
            if self.bytes > self.peak_bytes:
                self.peak_bytes, self.peak_bookkeeping_bytes = self.bytes, self.bookkeeping_bytes

    def count_generated(self, ended_B: Tensor | None) -> None:
        """The last forward's last query has produced a token; `ended_B` [B] says which sequences now end."""
        self.reads_LBG += self.latest_reads_LBG * self.active_B[:, None]
        self.dense_reads_B += self.seen_B * self.active_B
        self.generated_B += self.active_B
        if ended_B is not None:
            self.active_B &= ~ended_B.to(self.active_B.device)

    @property
    def latest_reads_LBG(self) -> Tensor:
        """What the last forward's last query read: with DMS what is held after it, since what is dropped is
        exactly what it could not see."""
        return self.held_LBG

    def match_rows(self, rows: int) -> None:
        """Count each of the sequences for which a prompt was computed once by itself from here on."""
        if self.rows not in (0, rows):
            index = torch.arange(self.rows, device=self.active_B.device)
            self.select_sequences(index.repeat_interleave(rows // self.rows))

    @torch.inference_mode(False)
    def select_sequences(self, index: Tensor) -> None:
        """Follow the cache when a beam search reorders, repeats or drops sequences."""
        if not self.rows:
            return
        for names, dim in ((PER_SEQUENCE, 0), (self.per_head, 1)):
            for name in names:
                value = getattr(self, name)
                setattr(self, name, value.index_select(dim, index.to(value.device)))

    def stats(self) -> KVStats | None:
        """The sums as plain numbers (synchronises with the device), or None before the first forward."""
        if not self.rows:
            return None
        evicted_LBG = self.evicted_LBG + self.arrived_LBG
        layers, _, heads = evicted_LBG.shape
        decided = int(self.decided_B.sum())
        fraction_LG = evicted_LBG.sum(dim=1).double() / max(decided, 1)
        fraction = float(fraction_LG.mean())
        reads_LBG, peak_LBG = self.reads_LBG.double(), self.peak_LBG.double()
        reads, peaks = reads_LBG.mean(dim=(0, 2)).tolist(), peak_LBG.mean(dim=(0, 2)).tolist()
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
            kv_reads_per_head=reads_LBG.mean(dim=1).tolist(),
            peak_tokens_per_head=peak_LBG.mean(dim=1).tolist(),
        )


def _mean(values: list) -> float:
    return sum(values) / len(values)
