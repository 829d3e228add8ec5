"""Samples on disk: everything that was generated, a line for each problem, so that scoring needs no model.

    OUT/settings.json                 what was asked for; only the same may be resumed
    OUT/samples/METHOD-W-L-CR-seedN.jsonl

A line is one problem. A batch of problems is written at once, after it is complete; what an interruption
left of a line or of a batch is not read, and gives way to the next batch that is written.
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
_FREE = ("data", "limit", "task_options")  # what these change in the problems, `problems` tells


@dataclass(frozen=True)
class Chain:
    """One answer to a problem, and what it cost; see KVStats in megatron_dms/hf/stats_dms.py."""

    text: str
    tokens: int
    """Generated, an end-of-sequence token included."""
    ended: bool
    """False where it was cut off at L tokens."""
    loops: bool
    """It was cut off while it repeated itself."""
    kv_reads: float
    """In pairs, mean over layers and KV heads."""
    dense_kv_reads: int
    """The same with every pair kept."""
    peak_tokens: float
    """In pairs, mean over layers and KV heads."""


@dataclass(frozen=True)
class Batch:
    """What is known of the batch that a problem was in, as a whole."""

    index: int
    problems: int
    seconds: float
    """Wall time of generating."""
    evicted_fraction: float
    """Of the pairs decided on."""
    decided: int
    """Decisions in each head, over all sequences: the weight of that fraction."""
    peak_bytes: int
    """Allocated for keys and values, the batch's chains together."""


@dataclass(frozen=True)
class Sample:
    """One problem with all its chains."""

    id: str
    chains: list[Chain]
    batch: Batch

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> "Sample":
        """Figures that earlier versions kept besides are dropped.

        Raises:
            ValueError, KeyError, TypeError: it is no sample.
        """
        chains = [_checked(Chain, chain) for chain in entry["chains"]]
        sample = _checked(cls, entry | {"chains": chains, "batch": _checked(Batch, entry["batch"])})
        if sample.batch.problems < 1:
            raise ValueError(f"batch.problems is {sample.batch.problems}, expected at least 1")
        return sample


def _checked[T](kind: type[T], entry: dict[str, Any]) -> T:
    """A dataclass of texts, truth values and finite numbers."""
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
    """Whether some pair was evicted or not read; of a run at CR 1, which is not to compress, True."""
    chains = [chain for sample in samples for chain in sample.chains]
    evicted = any(sample.batch.evicted_fraction > 0 for sample in samples)
    return run.budget.cr == 1 or evicted or any(chain.kv_reads < chain.dense_kv_reads for chain in chains)


class SampleFile:
    """The samples of one run, in the order of the problems. Reading leaves the file as it is."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: a whole line is not a sample.
        """
        self.path = path
        self.samples: list[Sample] = []
        self._size = self._complete = 0  # bytes of the file, and of those of complete batches
        if path.exists():
            self._read()

    def append(self, samples: Iterable[Sample]) -> None:
        """One complete batch, in place of what an interruption left.

        Raises:
            ValueError: something else has written to the file since.
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
    """Write the settings into a folder, or add to those of the samples there. What both name must be the
    same, but for where checkpoints and data are, how many problems were asked for, and how they are graded:
    there the later call holds. MADE_BY, what made the samples, is left alone; see `note_maker`.

    Raises:
        ValueError: the folder is another one's, or holds samples with other settings.
    """
    settings, found = json.loads(json.dumps(settings)), {}
    if (folder / SETTINGS).exists():
        found = read_settings(folder)
        if not runs_there(folder):  # a call that failed before its first sample binds nobody
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
    """What must stay: of a checkpoint its hash, wherever it lies."""
    is_checkpoint = name == "model" or name.startswith("dms ")
    return value[1:] if is_checkpoint and isinstance(value, list) else value


def note_maker(folder: Path, maker: Mapping[str, str]) -> None:
    """Add to the settings what is about to write samples, unless it is there."""
    settings = read_settings(folder)
    if maker not in (makers := _makers(settings)):
        settings[MADE_BY] = [*makers, maker]
        write_durably(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _makers(settings: Mapping[str, Any]) -> list[Any]:
    found = settings.get(MADE_BY, [])
    return found if isinstance(found, list) else [found]  # earlier versions kept the first one only


def read_settings(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the folder holds no evaluation.
    """
    return read_object(folder / SETTINGS, "holds no evaluation")


def samples_path(folder: Path, run: Run) -> Path:
    return folder / "samples" / f"{run}.jsonl"


def runs_there(folder: Path) -> list[Run]:
    """The runs that have samples, be they complete or not; methods as in METHODS, then by budget and seed.

    Raises:
        ValueError: a file of samples has another name.
    """
    runs = [Run.parse(path.stem) for path in (folder / "samples").glob("*.jsonl")]
    return sorted(runs, key=lambda run: run.place)
