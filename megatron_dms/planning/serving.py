"""Inference: how long a decode step takes, and which W-L-CR (chains, tokens, compression ratio) fit a budget.

A step reads all weights and all live pairs once. Its time is that of reading them, or that of the FLOPs if
they take longer. W chains are one batch; each chain has its own copy of the prompt's pairs, as in the
exported model.
"""

from dataclasses import dataclass

from megatron_dms.planning.devices import Assumptions, Device
from megatron_dms.planning.models import ModelSize

PAGE = 64
"""Slots of a page (hf/pages_dms.py). On average half a page of each head is empty."""


def live_pairs(tokens: float, cr: float, window: int) -> float:
    """Return how many pairs a KV head holds after so many tokens, if it evicts 1 - 1 / CR of them.

    It holds all pairs within the window (window + 1 with the token itself), and one in CR of the older pairs
    .
    """
    inside = min(tokens, window + 1)
    return inside + (tokens - inside) / cr


@dataclass(frozen=True)
class Serving:
    """A model that is served on `tp` devices.

    window is in tokens. element: bytes of a number. fixed_seconds: time of each step beside reading and
    computing, such as kernel launches.
    """

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
        """Bytes of the weights on each device."""
        return self.element * self.model.parameters() / self.tp

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that a step reads on each device; an untied embedding is only looked up."""
        untied = 0 if self.model.tied else self.model.vocab * self.model.hidden
        return self.element * (self.model.parameters() - untied) / self.tp

    def pair_bytes(self, pairs: float) -> float:
        """Return the bytes of one sequence's pairs on each device, if each head holds so many of them."""
        return pairs * self.model.pair_bytes / 2 * self.element / self.tp

    def allocated_bytes(self, pairs: float, paged: bool) -> float:
        """Return the most bytes of a sequence: in pages, with one of 2 L tensors twice while it grows."""
        held = self.pair_bytes(pairs + PAGE / 2 if paged else pairs)
        return held * (1 + 1 / (2 * self.model.layers))

    def memory(self, chains: int, tokens: float, cr: float) -> float:
        """Return the bytes on each device after so many tokens, including the prompt. CR 1: a dense cache."""
        pairs = live_pairs(tokens, cr, self.window)
        return self.weight_bytes + chains * self.allocated_bytes(pairs, cr > 1) + self.assumed.overhead

    def step_seconds(self, chains: int, tokens: float, cr: float) -> float:
        """Return the seconds of a step, which makes one token for each chain, after so many tokens."""
        return self.seconds_of(chains, live_pairs(tokens, cr, self.window))

    def seconds_of(self, chains: int, pairs: float) -> float:
        """Return the seconds of a step, if the heads of each chain hold so many pairs."""
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
    """The most tokens that fit for one W and CR, and the cost of the last step. tokens 0: not even one fits.

    limit: what keeps the chains from being longer: memory, time or positions.
    """

    chains: int
    tokens: int
    cr: float
    limit: str
    memory: float
    step_seconds: float
    dense_memory: float
    """Bytes that W chains of L tokens would take without compression."""


def longest(serving: Serving, chains: int, cr: float, memory: float, seconds: float) -> Fit:
    """Find the largest L for which W chains of L tokens fit into the memory of each device and the time.

    memory: bytes. seconds: of the last step. Both grow with L, so L is found by bisection.
    """

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
