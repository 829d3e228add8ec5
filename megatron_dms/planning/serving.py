"""Inference: what a decode step takes, and which W-L-CR (chains, tokens, compression ratio) fit a budget.

A step reads all weights and all live pairs once: bytes over bandwidth, or the products' FLOPs if they take
longer. W chains are one batch; each has its own copy of its prompt's pairs, as the exported model does.
"""

from dataclasses import dataclass

from megatron_dms.planning.devices import Assumptions, Device
from megatron_dms.planning.models import ModelSize

PAGE = 64
"""Slots of a page (hf/pages_dms.py); half a page per head is empty on average."""


def live_pairs(tokens: float, cr: float, window: int) -> float:
    """Pairs that a KV head holds after so many tokens, if it evicts 1 - 1 / CR of them: all within the window
    (window + 1 with the token itself), one in CR of the older ones. (DMS.md, section 4.)"""
    inside = min(tokens, window + 1)
    return inside + (tokens - inside) / cr


@dataclass(frozen=True)
class Serving:
    """A model on `tp` devices. window in tokens; element: bytes of a number; fixed_seconds: of each step,
    whatever it reads (launches)."""

    model: ModelSize
    device: Device
    assumed: Assumptions
    tp: int = 1
    window: int = 256
    element: int = 2
    fixed_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.model.heads % self.tp or self.model.groups % self.tp:
            raise ValueError(
                f"--tp is {self.tp}, expected a divisor of {self.model.heads} query and {self.model.groups} "
                f"KV heads of {self.model.name}"
            )

    @property
    def weight_bytes(self) -> float:
        """Per device."""
        return self.element * self.model.parameters() / self.tp

    @property
    def read_bytes(self) -> float:
        """Weights that a step reads, per device: an embedding of its own is only looked up."""
        untied = 0 if self.model.tied else self.model.vocab * self.model.hidden
        return self.element * (self.model.parameters() - untied) / self.tp

    def pair_bytes(self, pairs: float) -> float:
        """Keys and values of one sequence whose heads hold so many pairs each, per device."""
        return pairs * self.model.pair_bytes / 2 * self.element / self.tp

    def allocated_bytes(self, pairs: float, paged: bool) -> float:
        """Of one sequence at most: in pages, and one of the 2 L tensors twice while it grows."""
        held = self.pair_bytes(pairs + PAGE / 2 if paged else pairs)
        return held * (1 + 1 / (2 * self.model.layers))

    def memory(self, chains: int, tokens: float, cr: float) -> float:
        """Bytes per device at the end of so many tokens, the prompt among them. CR 1: a dense cache."""
        pairs = live_pairs(tokens, cr, self.window)
        return self.weight_bytes + chains * self.allocated_bytes(pairs, cr > 1) + self.assumed.overhead

    def step_seconds(self, chains: int, tokens: float, cr: float) -> float:
        """One token for each chain, after so many tokens."""
        return self.seconds_of(chains, live_pairs(tokens, cr, self.window))

    def seconds_of(self, chains: int, pairs: float) -> float:
        """One token for each chain, whose heads hold so many pairs."""
        model, device, assumed = self.model, self.device, self.assumed
        reading = (self.read_bytes + chains * self.pair_bytes(pairs)) / (device.bandwidth * assumed.memory)
        matrices = model.layers * model.layer_matmul + model.vocab * model.hidden
        attended = 2 * model.layers * model.q * pairs
        computing = 2 * chains * (matrices + attended) / self.tp / (device.flops * assumed.matmul)
        seconds = max(reading, computing) + self.fixed_seconds
        if self.tp > 1:  # two all-reduces in each layer
            link = device.node_link if self.tp <= device.per_node else device.network
            size = 2 * (self.tp - 1) / self.tp * chains * model.hidden * self.element
            seconds += 2 * model.layers * (assumed.latency + size / (link * assumed.network))
        return seconds


@dataclass(frozen=True)
class Fit:
    """The most tokens for one W and CR, and what a step costs at their end. tokens 0: not even one fits.

    limit: memory, time, or positions, what keeps it from being longer.
    """

    chains: int
    tokens: int
    cr: float
    limit: str
    memory: float
    step_seconds: float
    dense_memory: float
    """Bytes that W-L without compression would take."""


def longest(serving: Serving, chains: int, cr: float, memory: float, seconds: float) -> Fit:
    """The largest L such that the last step of W chains of L tokens fits into `memory` bytes of each device
    and `seconds`. Both only grow with L, so L is found by halving."""

    def fits(tokens: int) -> bool:
        return (
            serving.memory(chains, tokens, cr) <= memory
            and serving.step_seconds(chains, tokens, cr) <= seconds
        )

    low, high = 0, serving.model.positions + 1  # low fits (or is 0), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == serving.model.positions:
        limit = "positions"
    else:
        limit = "memory" if serving.memory(chains, low + 1, cr) > memory else "time"
    return Fit(
        chains,
        low,
        cr,
        limit,
        serving.memory(chains, low, cr),
        serving.step_seconds(chains, low, cr),
        serving.memory(chains, low, 1.0),
    )
