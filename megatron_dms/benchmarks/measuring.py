"""Time and memory of several candidates for the same work. The candidates take turns, as machines are noisy.

On CUDA, times come from events and bytes from the allocator. On the CPU, times come from the wall clock and
bytes from counting torch's storages, which does not see scratch memory inside an operator.
"""

import gc
import platform
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch

from megatron_dms.upstream.torch_operators import OperatorMode, storages

CACHE_BYTES = 2**28
"""Bytes written before each timed call on CUDA: they flush its caches and give the host time to run ahead."""


class Candidate(NamedTuple):
    """One way to do the work. The result of `run` is dropped at once."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    """Called before each run, outside the timing."""


@dataclass(frozen=True)
class Measured:
    """Time and memory of one candidate. A field is None, never an estimate, if it was not measured."""

    ms: float | None = None
    """Median time."""
    low_ms: float | None = None
    """First quartile."""
    high_ms: float | None = None
    """Third quartile."""
    peak_bytes: int | None = None
    """The largest number of bytes allocated at once, beyond what was allocated before."""
    note: str | None = None
    """Why a field is None."""

    def per(self, calls: int) -> "Measured":
        """Return the time of one call, if a run makes so many equal calls."""
        ms, low_ms, high_ms = (
            None if ms is None else ms / calls for ms in (self.ms, self.low_ms, self.high_ms)
        )
        return Measured(ms, low_ms, high_ms, self.peak_bytes, self.note)


@dataclass(frozen=True, kw_only=True)
class Result(Measured):
    """One row of a benchmark: its case and what was measured. Each benchmark adds the fields of its case."""

    device: str
    """As `device_name` gives it."""
    dtype: str
    """As `dtype_name` gives it."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields: the case first, then what was measured."""
        entries = asdict(self)
        measured = {item.name: entries.pop(item.name) for item in fields(Measured)}
        return entries | measured


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without the prefix "torch."."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} threads"


def ratio(own: Measured, other: Measured | None) -> float | None:
    """Return the quotient of two medians of one run; None if either was not measured."""
    return own.ms / other.ms if other and own.ms is not None and other.ms is not None else None


def compare[K](candidates: Mapping[K, Candidate], repeats: int, device: torch.device) -> dict[K, Measured]:
    """Run each candidate once to warm up, once for its memory, and then all of them `repeats` times in turn.

    A candidate that fails, because it is refused or memory ends, is not measured; the others go on.
    """
    times: dict[K, list[float]] = {}
    peaks: dict[K, int | None] = {}
    notes: dict[K, str] = {}

    def attempt[F: (int, float)](name: K, measure: Callable[[Candidate, torch.device], F]) -> F | None:
        try:
            return measure(candidates[name], device)
        except Exception as error:  # whatever it is, it is what the row has to say
            notes[name] = reason(error)
        release(device)
        if device.type != "cuda":
            torch.compiler.reset()  # what it could not compile under the counter it refuses ever after
        return None

    for name in candidates:
        if attempt(name, _seconds) is not None:
            times[name], peaks[name] = [], attempt(name, _peak)
            if peaks[name] is None:
                attempt(name, _seconds)  # compiles again
    for _ in range(repeats):
        for name in list(times):
            seconds = attempt(name, _seconds)
            if seconds is None:
                del times[name]
            else:
                times[name].append(seconds)
    return {
        name: (
            summary(times[name], peaks[name], notes.get(name))
            if name in times
            else Measured(note=notes[name])
        )
        for name in candidates
    }


def summary(seconds: list[float], peak: int | None, note: str | None = None) -> Measured:
    """Return median and quartiles; `note` says why there is no peak."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Measured(1e3 * middle, 1e3 * low, 1e3 * high, peak, note and f"peak: {note}")


def release(device: torch.device) -> None:
    """Free the memory that nothing refers to any longer."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wall_seconds(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes by the wall clock."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _seconds(candidate: Candidate, device: torch.device) -> float:
    candidate.prepare()
    if device.type != "cuda":
        return wall_seconds(candidate.run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(CACHE_BYTES, dtype=torch.int8, device=device).zero_()
    begin.record()
    candidate.run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _peak(candidate: Candidate, device: torch.device) -> int:
    candidate.prepare()
    with Memory(device) as memory:
        candidate.run()
    return memory.peak


def reason(error: Exception) -> str:
    """Return what went wrong in a few words, for a note."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:110]


class Memory(AbstractContextManager):
    """Counts the bytes allocated inside a `with` block, beyond what was allocated at its beginning."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._counter: Any = nullcontext() if device.type == "cuda" else StorageCounter()
        self._before = 0
        self._peak: int | None = None

    def __enter__(self) -> "Memory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._peak = self.peak
        self._counter.__exit__(*error)

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._counter.peak = self._counter.alive

    @property
    def alive(self) -> int:
        """Bytes allocated now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._before
        return self._counter.alive

    @property
    def peak(self) -> int:
        """The largest number of bytes so far; after the block, the largest inside it."""
        if self.device.type == "cuda":
            highest = torch.cuda.max_memory_allocated(self.device) - self._before
            return highest if self._peak is None else self._peak
        return self._counter.peak


class StorageCounter(OperatorMode):
    """Adds the bytes of each storage that an operator makes, and subtracts them when the storage dies.

    torch refuses to run FlexAttention under this mode, so its peak is not measured on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = storages((args, kwargs)).keys()
        out = func(*args, **kwargs)
        for address, storage in storages(out).items():
            if address not in given and address not in self._known:
                self._count(address, storage)
        return out

    def _count(self, address: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def forget(_: weakref.ref) -> None:
            del self._known[address]
            self.alive -= size

        self._known[address] = weakref.ref(storage, forget)
        self.alive += size
        self.peak = max(self.peak, self.alive)
