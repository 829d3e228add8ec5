"""What a smaller cache buys a server (the paper's Figure 4): decode steps by context and batch, and the
largest batch in a budget of memory, DMS against transformers' dense cache in one process.

Models have random weights, caches are filled without a prompt (filled.py): one sequence is, and repeated.
Both sides run step by step, no CUDA graph; DMS attends with the Triton kernel on CUDA, plain torch elsewhere.

Shapes: B sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache

from megatron_dms.benchmarks.measuring import (
    Candidate,
    Measured,
    Memory,
    compare,
    device_name,
    ratio,
    reason,
    release,
    summary,
    wall_seconds,
)
from megatron_dms.benchmarks.serve_rows import ACCOUNT, ALLOCATION, LargestRow, StepRow
from megatron_dms.benchmarks.synthetic_models import WINDOW, Pair, check_shape, fill, make_models

WARM_UP = 2
"""Steps before a measurement. The first one enlarges DMS's pools where they are full, the dense cache is new
at each one: what that takes beside the cache is part of the peak."""


class Serving:
    """A batch of equally long sequences in a cache of their own, dense or DMS."""

    def __init__(self, models: Pair, cr: float | None, context: int, batch: int) -> None:
        self.model = models.dense if cr is None else models.dms
        self.cr, self.context, self.batch = cr, context, batch
        size = (batch, 1)
        self.ids_B1 = torch.randint(self.model.config.vocab_size, size, device=self.model.device)
        self.cache: Cache | None = None
        self.cache_bytes: int | None = None
        self.peak_bytes: int | None = None

    def start(self) -> None:
        """Fill the cache, warm up, and count the bytes, once."""
        if self.cache is not None:
            return
        with Memory(self.model.device) as memory:
            self.cache = self.model.make_cache() if self.cr else DynamicCache()
            try:
                fill([self.cache], self.model, 1, self.context, self.cr or 1)
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
        self.model(self.ids_B1, past_key_values=self.cache, use_cache=True)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def attempt(self, repeats: int) -> Measured:
        """Start and time so many steps, alone. The cache is gone afterwards."""
        try:
            self.start()
            return summary([wall_seconds(self.step) for _ in range(repeats)], self.peak_bytes)
        except Exception as error:  # whatever it is, it is what the row has to say
            note = reason(error)
        finally:
            self.cache = None
        release(self.model.device)
        return Measured(note=note)


class Setting(NamedTuple):
    """What all rows of a run share."""

    shape: str
    dtype: torch.dtype
    device: torch.device
    models: Pair
    memory_bytes: int
    max_batch: int | None
    repeats: int

    def columns(self, cr: float | None) -> dict[str, Any]:
        return {
            "device": device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.shape,
            "page_attention": None if cr is None else self.models.dms.page_attention,
            "cr": cr,
        }


@torch.no_grad()
def measure(
    shape: str, contexts: Sequence[int], batches: Sequence[int], crs: Sequence[float],
    memory_gb: float | None, max_batch: int | None, repeats: int, dtype: torch.dtype, device: torch.device,
    say: Callable[[str], None],
) -> tuple[list[StepRow], list[LargestRow]]:  # fmt: skip
    """Both kinds of rows, by context (in tokens), batch and cache: the dense one, then each ratio's.

    Args:
        memory_gb: the budget in 10^9 bytes; None: what is free on the GPU.
        max_batch: throughput is measured at no more sequences; None: at the largest batch itself.
        repeats: steps that are timed, and rounds in which the caches take turns.

    Raises:
        ValueError: a number out of range, an unknown shape, no budget without a GPU.
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
    for cr in (None, max(crs)):  # libraries' own workspaces must not count as a cache's
        Serving(models, cr, WINDOW + 1, 1).attempt(1)
    steps: list[StepRow] = []
    largest: list[LargestRow] = []
    for context in contexts:
        for batch in sorted(batches):
            say(f"context {context}, batch {batch} ...")
            steps += _steps(setting, [None, *crs], context, batch)
        of_context = [row for row in steps if row.context == context]
        dense = None
        for cr in (None, *crs):
            say(f"context {context}, largest batch, {'dense' if cr is None else f'CR {cr:g}'} ...")
            largest.append(_largest(setting, [row for row in of_context if row.cr == cr], dense))
            dense = dense or largest[-1]
    return steps, largest


def _budget(memory_gb: float | None, device: torch.device) -> int:
    """In bytes."""
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


def _steps(setting: Setting, crs: Sequence[float | None], context: int, batch: int) -> list[StepRow]:
    """The caches live side by side and take turns."""
    serving = {cr: Serving(setting.models, cr, context, batch) for cr in crs}
    candidates = {cr: Candidate(own.step, own.start) for cr, own in serving.items()}
    found = compare(candidates, setting.repeats, setting.device)
    rows = []
    for cr, own in found.items():
        times = (own.ms, own.low_ms, own.high_ms, ratio(own, found[None]))
        sizes = (serving[cr].cache_bytes, serving[cr].peak_bytes)
        columns = setting.columns(cr) | {"context": context, "batch": batch}
        names = ("ms", "low_ms", "high_ms", "to_dense", "cache_bytes", "peak_bytes")
        columns |= dict(zip(names, times + sizes, strict=True))
        rows.append(StepRow(measured="decode step", **columns, note=own.note))
    return rows


def _largest(setting: Setting, rows: Sequence[StepRow], dense: LargestRow | None) -> LargestRow:
    """Of the cache and the context that these rows are about; `dense`: this, of the dense cache."""
    cr, context = rows[0].cr, rows[0].context
    largest = accounted = batch = sequence_bytes = own = None
    known = max((row for row in rows if row.peak_bytes), key=lambda row: row.batch, default=None)
    by_allocation = setting.device.type == "cuda"
    note = None if known else rows[0].note
    if known:
        sequence_bytes = known.peak_bytes / known.batch
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
        own = found.get(batch)
        note = own.note if own else "not one sequence fits"
    ms, low_ms, high_ms = (own.ms, own.low_ms, own.high_ms) if own else (None,) * 3
    throughput = None if ms is None else batch / ms * 1e3
    return LargestRow(
        measured="largest batch",
        **setting.columns(cr),
        context=context,
        memory_bytes=setting.memory_bytes,
        weight_bytes=setting.models.weight_bytes,
        bytes_batch=known and known.batch,
        sequence_bytes=sequence_bytes,
        accounted_batch=accounted,
        largest_batch=largest,
        found_by=known and (ALLOCATION if by_allocation else ACCOUNT),
        largest_to_dense=_quotient(largest, dense.largest_batch if dense else largest),
        batch=batch,
        capped=batch != largest,
        ms=ms,
        low_ms=low_ms,
        high_ms=high_ms,
        tokens_per_second=throughput,
        throughput_to_dense=_quotient(throughput, dense.tokens_per_second if dense else throughput),
        note=note,
    )


def account(memory_bytes: int, weight_bytes: int, sequence_bytes: float) -> int:
    """How many sequences fit beside the weights."""
    return max(0, int((memory_bytes - weight_bytes) // sequence_bytes))


def search(fits: Callable[[int], bool], guess: int) -> int:
    """The largest n >= 0 that fits, where whatever is smaller does, too; 0 is not tried.

    Few attempts where the guess is close, as each one fills the memory: strides that double until n is
    between one that fits and one that does not, then halves.
    """
    n, stride = max(guess, 1), max(guess // 16, 1)
    low, high = 0, None
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
    """torch allocates no more than that on a GPU."""
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
