"""Find the rows of a dataset: in a file, in a folder, or on the hub.

A folder is laid out as `hf download --local-dir` writes it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dms.evaluation.tasks.dataset_files import FORMATS, DatasetRow, read_rows

_SPLITS = {
    "train": ("train",),
    "test": ("test",),
    "validation": ("validation", "valid", "val"),
    "dev": ("dev",),
}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})((?:-[0-9a-f]{16})?\.parquet)$")


@dataclass(frozen=True)
class Dataset:
    """A dataset's place on the hub."""

    repository: str
    split: str
    """One of the keys of _SPLITS."""
    config: str | None = None
    """The hub's name for one of several datasets in a repository: a folder, or the beginning of file
    names."""

    def rows(self, source: Path | None) -> Iterator[DatasetRow]:
        """Return the rows of the split.

        Args:
            source: a file or a folder; None for the hub.

        Raises:
            ValueError: the hub cannot be reached, and as `find_files` and `read_rows`.
        """
        if source is None:
            return self._from_hub()
        return read_rows(find_files(source, self.split, self.config))

    def _from_hub(self) -> Iterator[DatasetRow]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(f"{self.repository} needs `pip install datasets`, or give a folder") from error
        try:
            loaded = load_dataset(self.repository, self.config, split=self.split)
        except Exception as error:  # five libraries raise here: offline, gated, unknown name, broken download
            raise unreachable(self.repository, error) from error
        for number, fields in enumerate(loaded):
            yield DatasetRow(f"{self.repository}, row {number + 1}", number, dict(fields))


def unreachable(repository: str, error: Exception) -> ValueError:
    """Return an error to raise. Its message is one line: the libraries' own messages are long."""
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"{repository} cannot be loaded from the hub ({type(error).__name__}: {reason}); download it with "
        f"`hf download --repo-type dataset {repository} --local-dir FOLDER` and give FOLDER"
    )


def find_files(source: Path, split: str, config: str | None = None) -> list[Path]:
    """Return the file of a split, or the shards of the split in order.

    A file is taken as it is. In a folder, the candidates are the files of the config: files in a folder with
    the config's name, and files whose name begins with that name. The split is taken from the candidates that
    have the split as a word of their name, such as test-00000-of-00001.parquet or gsm8k_test.jsonl; if there
    is none, from the candidates that name no split. If the folder has no file of the config, the folder may
    be the config's own folder; then only files directly in the folder that name the split are taken. A file
    that does not name the split may belong to another config, such as gpqa_main.csv for gpqa_diamond.

    Args:
        split: one of the keys of _SPLITS.

    Raises:
        ValueError: no file fits, several files fit, or a shard is missing.
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
    """Return all files of a known format in a folder and in the folders below, sorted by name.

    Raises:
        ValueError: the folder does not exist or has no such file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; expected a file or a folder")
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(FORMATS) and file.is_file())
    files = [
        file
        for file in files
        # The download keeps its own records in .cache.
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
    """Return a single file, or all shards of one file; None if the files are several.

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
