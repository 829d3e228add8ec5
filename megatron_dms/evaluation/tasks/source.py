"""Where a dataset's rows come from: a file, a folder as `huggingface-cli download --local-dir` leaves it, or
the hub."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dms.evaluation.tasks.dataset_files import FORMATS, Row, read_rows

_SPLITS = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("validation", "valid", "val"),
    "dev": ("dev",),
}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})((?:-[0-9a-f]{16})?\.parquet)$")


@dataclass(frozen=True)
class Dataset:
    """On the hub."""

    repository: str
    split: str
    """One of the keys of _SPLITS."""
    config: str | None = None
    """The hub's name of one of several datasets in it: a folder, or the beginning of a file's name."""

    def rows(self, source: Path | None) -> Iterator[Row]:
        """
        Args:
            source: a file, or a folder; None for the hub.

        Raises:
            ValueError: as `find_files` and `rows.read_rows`; the hub cannot be reached.
        """
        if source is None:
            return self._from_hub()
        return read_rows(find_files(source, self.split, self.config))

    def _from_hub(self) -> Iterator[Row]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(f"{self.repository} needs `pip install datasets`, or give a folder") from error
        try:
            loaded = load_dataset(self.repository, self.config, split=self.split)
        except Exception as error:  # of five libraries: offline, gated, no such name, a broken download
            raise unreachable(self.repository, error) from error
        for number, fields in enumerate(loaded):
            yield Row(f"{self.repository}, row {number + 1}", number, dict(fields))


def unreachable(repository: str, error: Exception) -> ValueError:
    """To be raised; on one line, as the libraries' own messages are long."""
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"{repository} cannot be loaded from the hub ({type(error).__name__}: {reason}); download it with "
        f"`huggingface-cli download --repo-type dataset {repository} --local-dir FOLDER` and give FOLDER"
    )


def find_files(source: Path, split: str, config: str | None = None) -> list[Path]:
    """The file of a split, or its shards in order.

    A file is taken as it is. In a folder, the files of the config are looked at: those in a folder of that
    name, and those whose name begins with it. Of these, the ones count whose name has the split as one of its
    words, such as test-00000-of-00001.parquet or gsm8k_test.jsonl; if none does, one that names no split.
    If nothing is of the config, `source` may be the config's own folder: files right in it that name the
    split. One that does not may well be of another config, such as gpqa_main.csv for gpqa_diamond.

    Args:
        split: one of the keys of _SPLITS.

    Raises:
        ValueError: nothing is there or fits, several files do, or a shard is missing.
    """
    if source.is_file():
        return [source]
    files = data_files(source)
    wanted = f"one file of the split {split}" + (f" of {config}" if config else "")
    inside = [file for file in files if config is None or _of_config(file.relative_to(source), config)]
    candidates = inside or [file for file in files if file.parent == source]
    chosen = [file for file in candidates if split in _splits(file)]
    if inside and not chosen:
        chosen = [file for file in candidates if not _splits(file)]
    whole = _shards(chosen) if chosen else None
    if whole is None:
        found = _names(chosen or files, source)
        raise ValueError(f"{source}: found {found}, expected {wanted}; give the file itself")
    return whole


def data_files(folder: Path) -> list[Path]:
    """All files of a known format in a folder and those in it, by name.

    Raises:
        ValueError: the folder is none, or has no such file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; expected a file or a folder")
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(FORMATS) and file.is_file())
    files = [
        file
        for file in files
        # .cache is where the download keeps its own records.
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.name not in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
    ]
    if not files:
        raise ValueError(f"{folder} has no data; expected a file that ends in one of {', '.join(FORMATS)}")
    return files


def _of_config(file: Path, config: str) -> bool:
    return config in file.parts[:-1] or bool(re.match(rf"{re.escape(config)}\b", file.name))


def _splits(file: Path) -> set[str]:
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    return {split for split, names in _SPLITS.items() if words & set(names)}


def _names(files: Sequence[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _shards(files: list[Path]) -> list[Path] | None:
    """A single file, or all the shards of one; None for several.

    Raises:
        ValueError: a shard is missing.
    """
    matches = [_SHARD.match(file.name) for file in files]
    found = [match for match in matches if match is not None]
    if (
        len(found) < len(files)
        or len({(file.parent, m[1], m[3]) for file, m in zip(files, found, strict=True)}) > 1
    ):
        return files if len(files) == 1 else None
    if [int(match[2]) for match in found] != list(range(int(found[0][3]))):
        raise ValueError(f"{files[0].parent}: found {len(found)} shards of {found[0][3]}, expected all")
    return files
