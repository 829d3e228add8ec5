"""Samples on disk: everything that was generated, so that scoring needs no model.

    OUT/settings.json                        what was asked for; a call with other settings is refused
    OUT/samples/METHOD-W-L-CR-seedN.jsonl    one line for each problem

A batch of problems is written at once when it is complete. If an interruption left part of a line or part of
a batch, that part is not read, and the next batch that is written replaces it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_dms.evaluation.budgets import Run
from megatron_dms.files import read_object, write_durably

SETTINGS = "settings.json"
MADE_BY = "made_by"
_FREE = ("data", "limit", "task_options")  # if these change the problems, `problems` changes too


@dataclass(frozen=True)
class Chain:
    """One answer to a problem, and what it cost; see KVStats in megatron_dms/hf/stats_dms.py."""

    text: str
    tokens: int
    """Number of generated tokens, an end-of-sequence token included."""
    ended: bool
    """False if the chain was cut off at L tokens."""
    loops: bool
    """True if the chain was repeating itself when it was cut off."""
    kv_reads: float
    """In pairs, mean over layers and KV heads."""
    dense_kv_reads: int
    """KV reads if every pair were kept."""
    peak_tokens: float
    """In pairs, mean over layers and KV heads."""


@dataclass(frozen=True)
class Batch:
    """Figures that are known only of the whole batch that a problem was in."""

    index: int
    problems: int
    seconds: float
    """Wall time of the generation."""
    evicted_fraction: float
    """Evicted share of the pairs that were decided on."""
    decided: int
    """Number of decisions in each KV head over all sequences: the weight of `evicted_fraction`."""
    peak_bytes: int
    """Allocated for keys and values, for all chains of the batch together."""


@dataclass(frozen=True)
class Sample:
    """One problem with all its chains."""

    id: str
    chains: list[Chain]
    batch: Batch

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> "Sample":
        """Read a sample; figures that only earlier versions kept are dropped.

        Raises:
            ValueError, KeyError, TypeError: the entry is not a sample.
        """
        chains = [_checked(Chain, chain) for chain in entry["chains"]]
        sample = _checked(cls, entry | {"chains": chains, "batch": _checked(Batch, entry["batch"])})
        if sample.batch.problems < 1:
            raise ValueError(f"batch.problems is {sample.batch.problems}, expected at least 1")
        return sample


def _checked[T: (Chain, Batch, Sample)](kind: type[T], entry: dict[str, Any]) -> T:
    """Make a dataclass of texts, booleans and finite numbers.

    Raises:
        ValueError, KeyError: a field is missing or of another type.
    """
    values = {field.name: entry[field.name] for field in fields(kind)}
    for field in fields(kind):
        value, wanted = values[field.name], field.type
        if wanted not in (str, bool, int, float):
            continue
        found = float if wanted is float and type(value) is int else type(value)
        if found is not wanted or (wanted is float and not isfinite(value)):
            raise ValueError(f"{field.name} is {str(value)[:60]!r}, expected {wanted.__name__}")
    return kind(**values)


def compresses(run: Run, samples: Sequence[Sample]) -> bool:
    """Whether some pair was evicted or not read. True for a run at CR 1, which need not compress."""
    chains = [chain for sample in samples for chain in sample.chains]
    evicted = any(sample.batch.evicted_fraction > 0 for sample in samples)
    return run.budget.cr == 1 or evicted or any(chain.kv_reads < chain.dense_kv_reads for chain in chains)


class SampleFile:
    """The samples of one run, in the order of the problems. Reading does not change the file."""

    def __init__(self, path: Path) -> None:
        """Read the samples that are there.

        Raises:
            ValueError: a complete line is not a sample.
        """
        self.path = path
        self.samples: list[Sample] = []
        self._size = self._complete = 0  # bytes of the file, and of its complete batches
        if path.exists():
            self._read()

    def append(self, samples: Iterable[Sample]) -> None:
        """Write one complete batch in place of whatever an interruption left.

        Raises:
            ValueError: another process has written to the file in the meantime.
        """
        samples = list(samples)
        text = "".join(json.dumps(asdict(sample)) + "\n" for sample in samples).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() != self._size:
                raise ValueError(
                    f"{self.path} has {file.tell()} bytes, expected {self._size}: does another process write "
                    "to it?"
                )
            file.truncate(self._complete)
            file.write(text)
        self._complete += len(text)
        self._size = self._complete
        self.samples += samples

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        samples, lengths = [], []
        for number, line in enumerate(whole.splitlines(keepends=True), 1):
            try:
                samples.append(Sample.from_entry(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number} is no sample: {error}") from error
            lengths.append(len(line))
        if samples:
            last = samples[-1].batch
            rest = sum(sample.batch.index == last.index for sample in samples)
            if rest < last.problems:
                del samples[-rest:], lengths[-rest:]
        self.samples, self._size, self._complete = samples, len(text), sum(lengths)


def settle(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a folder, or add them to the settings of the samples in that folder.

    A setting that both calls name must be equal, with these exceptions, where the later call's value is kept:
    the places of checkpoints and data, the number of problems that are asked for, and the options of grading.
    MADE_BY says what made the samples; it stays as it is (see `note_maker`).

    Raises:
        ValueError: the folder holds something else, or samples with other settings.
    """
    settings, found = json.loads(json.dumps(settings)), {}
    if (folder / SETTINGS).exists():
        found = read_settings(folder)
        if not runs_there(folder):  # a call that failed before its first sample does not bind later calls
            found = {}
        for name in found:
            if name in (MADE_BY, *_FREE) or name not in settings:
                continue
            if _bound(name, settings[name]) != _bound(name, found[name]):
                raise ValueError(
                    f"{folder} holds an evaluation with {name} {found[name]!r}, now it is "
                    f"{settings[name]!r}: choose another --out"
                )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no evaluation: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    merged = found | settings | {MADE_BY: _makers(found)}
    write_durably(folder / SETTINGS, json.dumps(merged, indent=1) + "\n")


def _bound(name: str, value: Any) -> Any:
    """Return the part of a setting that must not change: the hash of a checkpoint, not its place."""
    is_checkpoint = name == "model" or name.startswith("dms ")
    return value[1:] if is_checkpoint and isinstance(value, list) else value


def note_maker(folder: Path, maker: Mapping[str, str]) -> None:
    """Add to the settings what is about to write samples, unless the settings name it already."""
    settings = read_settings(folder)
    if maker not in (makers := _makers(settings)):
        settings[MADE_BY] = [*makers, maker]
        write_durably(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _makers(settings: Mapping[str, Any]) -> list[Any]:
    found = settings.get(MADE_BY, [])
    return found if isinstance(found, list) else [found]  # earlier versions kept only the first maker


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of an evaluation.

    Raises:
        ValueError: the folder holds no evaluation.
    """
    return read_object(folder / SETTINGS, "holds no evaluation")


def samples_path(folder: Path, run: Run) -> Path:
    """Return the file of a run's samples."""
    return folder / "samples" / f"{run}.jsonl"


def runs_there(folder: Path) -> list[Run]:
    """Return the runs that have samples, complete or not, sorted by method, budget and seed.

    Raises:
        ValueError: a file of samples has another name.
    """
    runs = [Run.parse(path.stem) for path in (folder / "samples").glob("*.jsonl")]
    return sorted(runs, key=lambda run: run.place)
