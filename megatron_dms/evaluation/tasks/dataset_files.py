"""Rows of a dataset's files, whatever their format, with typed access that says where a row is wrong.

Formats: .jsonl, .json (a list of objects, or one object on each line), .csv (with a header line), each also
with .gz; .parquet. Files are read row by row where the format allows it: LiveCodeBench's have gigabytes.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from megatron_dms.evaluation.tasks.task import Problem

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")


@dataclass(frozen=True)
class Row:
    where: str
    """File and line or row, for messages."""
    number: int
    """Counted from 0 through all rows of the dataset; the id where it has none of its own."""
    fields: dict[str, Any]

    def error(self, message: str) -> ValueError:
        """To be raised; it names the row."""
        return ValueError(f"{self.where}: {message}")

    def require(self, *names: str) -> None:
        """
        Raises:
            ValueError: a column is missing.
        """
        missing = [name for name in names if name not in self.fields]
        if missing:
            raise self.error(
                f"column {', '.join(missing)} missing; found {', '.join(map(str, self.fields)) or 'none'}, "
                f"expected {', '.join(names)}"
            )

    def get[T](self, name: str, kind: type[T]) -> T:
        """
        Raises:
            ValueError: the column is missing or of another type.
        """
        self.require(name)
        value = self.fields[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"column {name}: found {_short(value)}, expected {kind.__name__}")
        return value

    def text(self, name: str) -> str:
        """A text that is not blank.

        Raises:
            ValueError: it is, or no text.
        """
        value = self.get(name, str)
        if not value.strip():
            raise self.error(f"column {name}: found a blank text, expected some")
        return value

    def label(self, name: str) -> str:
        """An id or a number as text; datasets have them as either.

        Raises:
            ValueError: neither, or blank.
        """
        self.require(name)
        value = self.fields[name]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if is_number else self.text(name).strip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def read_rows(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of some files, one after the other.

    Raises:
        ValueError: a file is of another format, unreadable, or without rows.
    """
    number = 0
    for path in paths:
        first = number
        try:
            for place, fields in _fields(path):
                if not isinstance(fields, dict):
                    raise ValueError(f"{path}, {place}: found {_short(fields)}, expected an object")
                yield Row(f"{path}, {place}", number, fields)
                number += 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        except (OSError, EOFError) as error:  # gzip's are among them
            raise ValueError(f"{path} cannot be read: {error}") from error
        if number == first:
            raise ValueError(f"{path} is empty; expected at least one row")


def _fields(path: Path) -> Iterator[tuple[str, Any]]:
    """Place in the file, and what is there."""
    if path.name.endswith(".parquet"):
        yield from _parquet(path)
        return
    if not path.name.endswith(FORMATS):
        raise ValueError(f"found {path}, expected a name that ends in one of {', '.join(FORMATS)}")
    zipped = path.name.endswith(".gz")
    file: IO[str]
    # No other character than \n ends a line of JSON; csv wants line ends as they are. utf-8-sig drops Excel's
    # byte order mark, which would become part of the first column's name.
    with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        if path.name.removesuffix(".gz").endswith(".csv"):
            yield from _csv(path, file)
            return
        lines = ((place, line) for place, line in enumerate(file, 1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        if not path.name.removesuffix(".gz").endswith(".jsonl") and first[1].lstrip().startswith("["):
            whole = _json(first[1] + "".join(line for _, line in lines), f"{path}")
            yield from ((f"row {place}", fields) for place, fields in enumerate(whole, 1))
            return
        for place, line in chain([first], lines):
            yield f"line {place}", _json(line, f"{path}, line {place}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _csv(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    line = 0
    try:
        for fields in reader:
            if None in fields or None in fields.values():  # more values than columns, or fewer
                raise ValueError(f"{path}, up to line {reader.line_num}: found a row of another length")
            line = reader.line_num
            yield f"up to line {line}", fields
    except csv.Error as error:
        raise ValueError(f"{path}, after line {max(line, 1)}: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install pyarrow, or give the data as JSON") from error
    place = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for fields in batch.to_pylist():
                    place += 1
                    yield f"row {place}", fields
    except ArrowException as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def problems_of(
    rows: Iterable[Row], make: Callable[[Row], Problem | None], limit: int | None
) -> list[Problem]:
    """The first `limit` problems; no further row is read.

    Args:
        make: None for a row that is left out.

    Raises:
        ValueError: as `make`, and if two have the same id.
    """
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for row in rows:
        problem = make(row)
        if problem is None:
            continue
        if problem.id in seen:
            raise row.error(f"found id {problem.id!r} again, expected another than at {seen[problem.id]}")
        seen[problem.id] = row.where
        problems.append(problem)
        if len(problems) == limit:
            break
    return problems
