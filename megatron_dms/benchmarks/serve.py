"""What a smaller cache buys a server (the paper's Figure 4): decode steps by context and batch, and the
largest batch in a budget of memory, DMS against transformers' dense cache in one process.

Models have random weights. Caches are filled without a prompt (synthetic_models.py): one sequence is filled,
and repeated. Both sides run step by step, without a CUDA graph. DMS attends with the Triton kernel on CUDA,
and with plain torch elsewhere.

Shapes: B sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from megatron_dms.benchmarks.measuring import (
    Candidate,
    Measured,
    Memory,
    Result,
    compare,
    device_name,
    dtype_name,
    ratio,
    reason,
    release,
    summary,
    wall_seconds,
)
from megatron_dms.benchmarks.synthetic_models import WINDOW, Pair, check_shape, fill, make_models
from megatron_dms.hf.cache_dms import CACHE_NAME

WARM_UP = 2
"""Steps before a measurement. The first step enlarges the pools of DMS that are full, and each step makes the
dense cache anew: what this takes beside the cache is part of the peak."""
ALLOCATION, ACCOUNT = "allocation", "account of measured bytes"
"""The two ways to find the largest batch."""


@dataclass(frozen=True, kw_only=True)
class ServingResult(Result):
    """What both tables have in common. Bytes are counted beyond the weights."""

    measured: str
    """decode step, or largest batch."""
    shape: str
    page_attention: str | None
    """How DMS reads its pages; None for the dense cache, which uses transformers' SDPA."""
    context: int
    batch: int | None
    """Sequences of a step. For the largest batch: that batch or the cap; None if it is unknown."""
    cr: float | None
    """Compression ratio; None: the dense cache."""


@dataclass(frozen=True, kw_only=True)
class DecodeResult(ServingResult):
    """One decode step of all sequences of a batch. The peak is the largest number of bytes during steps."""

    batch: int
    to_dense: float | None
    """Time divided by that of the dense cache at the same context and batch; the two took turns."""
    cache_bytes: int | None
    """Bytes that live from step to step: pairs, empty slots, bookkeeping."""


@dataclass(frozen=True, kw_only=True)
class LargestResult(ServingResult):
    """The largest batch that fits in a budget of memory, and how fast this batch decodes."""

    memory_bytes: int
    """The budget for weights, caches and what a step needs."""
    weight_bytes: int
    bytes_batch: int | None
    """The batch whose bytes were measured."""
    sequence_bytes: float | None
    """The peak of that batch (in DecodeResult) for each of its sequences."""
    accounted_batch: int | None
    """(memory - weights) / sequence_bytes, rounded down."""
    largest_batch: int | None
    """The accounted batch, or on CUDA the largest batch that could be allocated and run."""
    found_by: str | None
    """ALLOCATION or ACCOUNT."""
    largest_to_dense: float | None
    capped: bool
    """Whether throughput is measured at a smaller batch than the largest."""
    tokens_per_second: float | None
    """Throughput of the whole batch. Each cache has the memory to itself, so the caches do not take turns."""
    throughput_to_dense: float | None

    def as_json(self) -> dict[str, Any]:
        """Return all fields but the peak, which the budget bounds."""
        entries = super().as_json()
        del entries["peak_bytes"]
        return entries


class Serving:
    """A batch of equally long sequences in a cache of its own, dense or DMS."""

    def __init__(self, models: Pair, cr: float | None, context: int, batch: int) -> None:
        self.models = models
        self.model: PreTrainedModel = models.dense if cr is None else models.dms
        self.device: torch.device = self.model.device
        self.cr, self.context, self.batch = cr, context, batch
        self.ids_B1 = torch.randint(models.shape.vocab, (batch, 1), device=self.device)
        self.cache: Cache | None = None
        self.cache_bytes: int | None = None
        self.peak_bytes: int | None = None

    def start(self) -> None:
        """Fill the cache, warm up and count the bytes, unless this has been done."""
        if self.cache is not None:
            return
        with Memory(self.device) as memory:
            self.cache = DynamicCache() if self.cr is None else self.models.dms.make_cache()
            try:
                fill([self.cache], self.models, 1, self.context, self.cr or 1)
                if self.batch > 1:
                    self.cache.batch_repeat_interleave(self.batch)
                memory.restart_peak()
                for _ in range(WARM_UP):
                    self.step()
            except BaseException:
                self.cache = None  # out of memory: let it go
                raise
            self.cache_bytes, self.peak_bytes = memory.alive, memory.peak

    def step(self) -> None:
        """Decode one token of each sequence."""
        self.model(self.ids_B1, use_cache=True, **{CACHE_NAME: self.cache})
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def attempt(self, repeats: int) -> Measured:
        """Start and time so many steps, without taking turns. The cache is dropped afterwards."""
        try:
            self.start()
            return summary([wall_seconds(self.step) for _ in range(repeats)], self.peak_bytes)
        except Exception as error:  # whatever it is, it is what the row has to say
            note = reason(error)
        finally:
            self.cache = None
        release(self.device)
        return Measured(note=note)


class Setting(NamedTuple):
    """What all results of a run share."""

    shape: str
    dtype: torch.dtype
    device: torch.device
    models: Pair
    memory_bytes: int
    max_batch: int | None
    repeats: int

    def common(self, cr: float | None, context: int) -> dict[str, Any]:
        """Return the fields that both kinds of results share."""
        return {
            "device": device_name(self.device),
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
            "page_attention": None if cr is None else self.models.dms.page_attention,
            "context": context,
            "cr": cr,
        }


@torch.no_grad()
def measure(
    shape: str, contexts: Sequence[int], batches: Sequence[int], crs: Sequence[float],
    memory_gb: float | None, max_batch: int | None, repeats: int, dtype: torch.dtype, device: torch.device,
    say: Callable[[str], None],
) -> tuple[list[DecodeResult], list[LargestResult]]:  # fmt: skip
    """Measure decode steps and largest batches by context (in tokens), batch and cache: dense, then each CR.

    Args:
        memory_gb: the budget in 10^9 bytes; None: the memory that is free on the GPU.
        max_batch: the most sequences at which throughput is measured; None: no limit.
        repeats: steps that are timed, and rounds in which the caches take turns.

    Raises:
        ValueError: a number is out of range, the shape is unknown, or there is no budget and no GPU.
    """
    check_shape(shape)
    if (
        min(*contexts, WINDOW + 1) <= WINDOW
        or min(*batches, repeats, 1 if max_batch is None else max_batch) < 1
    ):
        raise ValueError(f"expected batches, --max-batch and repeats >= 1, and contexts > {WINDOW} tokens")
    if not all(isfinite(cr) and cr >= 1 for cr in crs):
        raise ValueError(f"compression ratios are {', '.join(map(str, crs))}, expected finite numbers >= 1")
    memory = _budget(memory_gb, device)
    say(f"making {shape} with random weights, {dtype} ...")
    models = make_models(shape, max(crs), dtype, device)
    models.dms.page_attention = "triton" if device.type == "cuda" else "torch"
    setting = Setting(shape, dtype, device, models, memory, max_batch, repeats)
    for first in (None, max(crs)):  # workspaces of libraries must not count as parts of a cache
        Serving(models, first, WINDOW + 1, 1).attempt(1)
    steps: list[DecodeResult] = []
    largest: list[LargestResult] = []
    for context in contexts:
        for batch in sorted(batches):
            say(f"context {context}, batch {batch} ...")
            steps += _steps(setting, [None, *crs], context, batch)
        of_context = [row for row in steps if row.context == context]
        dense: LargestResult | None = None
        for cr in (None, *crs):
            say(f"context {context}, largest batch, {'dense' if cr is None else f'CR {cr:g}'} ...")
            largest.append(_largest(setting, [row for row in of_context if row.cr == cr], dense))
            dense = dense or largest[-1]
    return steps, largest


def _budget(memory_gb: float | None, device: torch.device) -> int:
    """Return the budget in bytes."""
    if memory_gb is not None and not (isfinite(memory_gb) and memory_gb > 0):
        raise ValueError(f"--memory is {memory_gb:g}, expected GB > 0")
    if device.type != "cuda":
        if memory_gb is None:
            raise ValueError("without CUDA --memory has to say how many GB the budget is")
        return int(memory_gb * 1e9)
    free, _ = torch.cuda.mem_get_info(device)
    if memory_gb is not None and memory_gb * 1e9 > free:
        raise ValueError(f"--memory is {memory_gb:g}, but {free / 1e9:.1f} GB are free on the GPU")
    return free if memory_gb is None else int(memory_gb * 1e9)


def _steps(setting: Setting, crs: Sequence[float | None], context: int, batch: int) -> list[DecodeResult]:
    """Measure decode steps of caches that live side by side and take turns."""
    serving = {cr: Serving(setting.models, cr, context, batch) for cr in crs}
    candidates = {cr: Candidate(own.step, own.start) for cr, own in serving.items()}
    found = compare(candidates, setting.repeats, setting.device)
    return [
        DecodeResult(
            *astuple(replace(own, peak_bytes=serving[cr].peak_bytes)),
            **setting.common(cr, context),
            measured="decode step",
            batch=batch,
            to_dense=ratio(own, found[None]),
            cache_bytes=serving[cr].cache_bytes,
        )
        for cr, own in found.items()
    ]


def _largest(setting: Setting, steps: Sequence[DecodeResult], dense: LargestResult | None) -> LargestResult:
    """Find the largest batch of one cache at one context.

    Args:
        steps: the decode steps of this cache at this context.
        dense: the result of the dense cache at this context; None for the dense cache itself.
    """
    cr, context = steps[0].cr, steps[0].context
    largest: int | None = None
    accounted: int | None = None
    batch: int | None = None
    sequence_bytes: float | None = None
    own = Measured(note=steps[0].note)
    sizes = {step.batch: step.peak_bytes for step in steps if step.peak_bytes}
    known = max(sizes, default=None)
    by_allocation = setting.device.type == "cuda"
    if known is not None:
        sequence_bytes = sizes[known] / known
        accounted = account(setting.memory_bytes, setting.models.weight_bytes, sequence_bytes)
        found: dict[int, Measured] = {}

        def fits(batch: int) -> bool:
            found[batch] = Serving(setting.models, cr, context, batch).attempt(setting.repeats)
            return found[batch].ms is not None

        with _limited_to(setting.memory_bytes, setting.device):
            largest = search(fits, accounted) if by_allocation else accounted
            batch = min(largest, setting.max_batch or largest)
            if batch and batch not in found:
                fits(batch)
        own = found.get(batch, Measured(note="not one sequence fits"))
    throughput = None if own.ms is None or batch is None else batch / own.ms * 1e3
    return LargestResult(
        *astuple(own),
        **setting.common(cr, context),
        measured="largest batch",
        memory_bytes=setting.memory_bytes,
        weight_bytes=setting.models.weight_bytes,
        bytes_batch=known,
        sequence_bytes=sequence_bytes,
        accounted_batch=accounted,
        largest_batch=largest,
        found_by=None if known is None else ALLOCATION if by_allocation else ACCOUNT,
        largest_to_dense=_quotient(largest, dense.largest_batch if dense else largest),
        batch=batch,
        capped=batch != largest,
        tokens_per_second=throughput,
        throughput_to_dense=_quotient(throughput, dense.tokens_per_second if dense else throughput),
    )


def account(memory_bytes: int, weight_bytes: int, sequence_bytes: float) -> int:
    """Return how many sequences fit in the memory beside the weights."""
    return max(0, int((memory_bytes - weight_bytes) // sequence_bytes))


def search(fits: Callable[[int], bool], guess: int) -> int:
    """Return the largest n >= 0 that fits, if every smaller n fits, too; 0 is not tried.

    Each attempt fills the memory, so there are few if the guess is close: strides double until n lies between
    a number that fits and one that does not; then the interval is halved.
    """
    n, stride = max(guess, 1), max(guess // 16, 1)
    low = 0
    high: int | None = None
    while high is None or high - low > 1:
        if fits(n):
            low = n
        else:
            high = n
        if high is None:
            n, stride = low + stride, 2 * stride
        elif low == 0:
            n, stride = max(high - stride, 1), 2 * stride
        else:
            n = (low + high) // 2
    return low


@contextmanager
def _limited_to(memory_bytes: int, device: torch.device) -> Iterator[None]:
    """Let torch allocate no more than this number of bytes on a GPU."""
    release(device)
    if device.type != "cuda":
        yield
        return
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(memory_bytes / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _quotient(own: float | None, other: float | None) -> float | None:
    return None if own is None or not other else own / other


def check_picture(path: Path) -> None:
    """Check that matplotlib can write a picture to this path.

    Raises:
        ValueError: the ending of the name is unknown, the file exists, or its folder does not.
    """
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise ValueError(f"--figure is {path}, expected a name that ends in .{', .'.join(sorted(known))}")
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"--figure {path} {'exists' if path.exists() else 'has no folder'}; choose another")


def draw(steps: Sequence[DecodeResult], largest: Sequence[LargestResult], path: Path) -> None:
    """Draw the latency of a step by cache and batch (left), and the largest batch of each cache (right).

    Points that were not measured are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    crs = list(dict.fromkeys(row.cr for row in largest))
    batches = sorted({row.batch for row in steps})
    contexts = sorted({row.context for row in steps})
    for i, cr in enumerate(crs):
        name = "dense" if cr is None else f"DMS, CR {cr:g}"
        for j, batch in enumerate(batches):
            line = [row for row in steps if row.cr == cr and row.batch == batch and row.ms is not None]
            style = {"color": f"C{i}", "marker": "osD^v"[j % 5], "linestyle": ("-", "--", ":", "-.")[j % 4]}
            label = f"{name}, batch {batch}"
            left.plot([row.context for row in line], [row.ms for row in line], label=label, **style)
        found = [row for row in largest if row.cr == cr and row.largest_batch is not None]
        right.plot([row.context for row in found], [row.largest_batch for row in found], "o-", label=name)
    left.set(xlabel="context, tokens", ylabel="decode step, ms")
    right.set(xlabel="context, tokens", ylabel=f"largest batch in {largest[0].memory_bytes / 1e9:g} GB")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
