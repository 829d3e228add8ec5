"""Time and memory of several candidates for the same work, measured in turn, because machines are noisy.

On CUDA times come from events and bytes from the allocator; on the CPU from the wall clock and from counting
torch's storages (scratch memory inside of an operator is not seen there).
"""

import gc
import platform
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch

from megatron_dms.upstream.torch_operators import OperatorMode, storages

CACHE_BYTES = 2**28
"""Written before each timed call on CUDA: more than its caches hold, and time for the host to run ahead."""


class Candidate(NamedTuple):
    """One way to do the work. What `run` returns is dropped at once."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    """Called before each run, untimed."""


@dataclass(frozen=True)
class Measured:
    """None where nothing was measured, never an estimate; `note` says why."""

    ms: float | None = None
    """Median."""
    low_ms: float | None = None
    high_ms: float | None = None
    """First and third quartile."""
    peak_bytes: int | None = None
    """The most that was allocated at once, beyond what there was before."""
    note: str | None = None

    def per(self, calls: int) -> "Measured":
        """Times of one of so many equal calls in a run."""
        times = (None if ms is None else ms / calls for ms in (self.ms, self.low_ms, self.high_ms))
        return Measured(*times, self.peak_bytes, self.note)


def device_name(device: torch.device) -> str:
    """Of the GPU; of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} threads"


def ratio(own: Measured, other: Measured | None) -> float | None:
    """Of two medians of one run; None if either was not measured."""
    return own.ms / other.ms if other and own.ms is not None and other.ms is not None else None


def compare[K](candidates: Mapping[K, Candidate], repeats: int, device: torch.device) -> dict[K, Measured]:
    """Run each once to warm up, once for its memory, and then all of them `repeats` times in turn.

    A candidate that fails, out of memory or refused, is not measured; the others go on.
    """
    times: dict[K, list[float]] = {}
    peaks: dict[K, int | None] = {}
    notes: dict[K, str] = {}

    def attempt(name: K, measure: Callable[[Candidate, torch.device], float]) -> float | None:
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
    """Median and quartiles; `note` says why there is no peak."""
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Measured(1e3 * middle, 1e3 * low, 1e3 * high, peak, note and f"peak: {note}")


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wall_seconds(run: Callable[[], object]) -> float:
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
    """In a few words, for a note."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:110]


class Memory(AbstractContextManager):
    """Bytes allocated inside of the `with`, beyond what there was at its beginning."""

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
        """Forget the most so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._counter.peak = self._counter.alive

    @property
    def alive(self) -> int:
        """Now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._before
        return self._counter.alive

    @property
    def peak(self) -> int:
        """The most so far, also after the end."""
        if self.device.type == "cuda":
            highest = torch.cuda.max_memory_allocated(self.device) - self._before
            return highest if self._peak is None else self._peak
        return self._counter.peak


class StorageCounter(OperatorMode):
    """Adds the bytes of each storage that an operator makes, and takes them off when it dies.

    torch refuses to run FlexAttention under it: that peak is not measured on the CPU.
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
