"""Rows of a dataset's files in any format, with typed access whose errors say which row is wrong.

Formats: .jsonl, .json (a list of objects, or one object on each line), .csv (with a header line), each of
them also with .gz; .parquet. Files are read row by row if the format allows it: LiveCodeBench's files have
gigabytes.

Why not through `datasets` (5.2): it infers one type for a column. A CSV answer 033 becomes 33, an answer NA
becomes null, and an integer beyond 64 bits becomes a float. A missing column or a short CSV row becomes null,
broken CSV quotes are accepted, and errors do not name the line of the file.
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
class DatasetRow:
    """One row: a problem as the dataset's makers wrote it."""

    where: str
    """File and line (or row), for messages."""
    number: int
    """Counted from 0 over all files of the dataset; serves as id in datasets without ids."""
    fields: dict[str, Any]

    def error(self, message: str) -> ValueError:
        """Return an error to raise; its message names the row."""
        return ValueError(f"{self.where}: {message}")

    def require(self, *names: str) -> None:
        """Check that the row has these columns.

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
        """Return the value of a column.

        Raises:
            ValueError: the column is missing or of another type.
        """
        self.require(name)
        value = self.fields[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"column {name}: found {_short(value)}, expected {kind.__name__}")
        return value

    def text(self, name: str) -> str:
        """Return a text that is not blank.

        Raises:
            ValueError: the value is blank or not a text.
        """
        value = self.get(name, str)
        if not value.strip():
            raise self.error(f"column {name}: found a blank text, expected some")
        return value

    def label(self, name: str) -> str:
        """Return an id or a number as text; datasets hold both as text or as number.

        Raises:
            ValueError: the value is blank, or neither a text nor a whole number.
        """
        self.require(name)
        value = self.fields[name]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if is_number else self.text(name).strip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def read_rows(paths: Iterable[Path]) -> Iterator[DatasetRow]:
    """Yield the rows of several files, one file after the other.

    Raises:
        ValueError: a file has another format, cannot be read, or has no rows.
    """
    number = 0
    for path in paths:
        first = number
        try:
            for place, fields in _fields(path):
                if not isinstance(fields, dict):
                    raise ValueError(f"{path}, {place}: found {_short(fields)}, expected an object")
                yield DatasetRow(f"{path}, {place}", number, fields)
                number += 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        except (OSError, EOFError) as error:  # errors of gzip are among these
            raise ValueError(f"{path} cannot be read: {error}") from error
        if number == first:
            raise ValueError(f"{path} is empty; expected at least one row")


def _fields(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a file, each with its place in the file."""
    if path.name.endswith(".parquet"):
        yield from _parquet(path)
        return
    if not path.name.endswith(FORMATS):
        raise ValueError(f"found {path}, expected a name that ends in one of {', '.join(FORMATS)}")
    zipped = path.name.endswith(".gz")
    file: IO[str]
    # Only \n ends a line of JSON; csv needs line ends as they are. utf-8-sig drops Excel's byte order mark,
    # which would otherwise become part of the first column's name.
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
            if None in fields or None in fields.values():  # more or fewer values than columns
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
    rows: Iterable[DatasetRow], make: Callable[[DatasetRow], Problem | None], limit: int | None
) -> list[Problem]:
    """Return the first `limit` problems; no further row is read.

    Args:
        make: returns the problem of a row, or None to leave the row out.

    Raises:
        ValueError: as `make`, or two problems have the same id.
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
