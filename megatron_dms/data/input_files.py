"""The rows of input files: JSON lines, JSON arrays, parquet and Arrow, compressed or not.

A file's first bytes say what the file is, so that a wrong or missing ending of the name does no harm. Lines
of JSON stay bytes, because the worker processes parse them; rows of the other formats come as objects.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from megatron_dms.errors import DataError

Row = bytes | dict[str, Any]
"""One document: a line of JSON, or the object that a line would hold."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROWS_AT_A_TIME = 64
_CHARACTERS_AT_A_TIME = 1 << 20
_REFUSED = {
    b"PK\x03\x04": "a zip archive, expected JSON lines or parquet; unpack it",
    b"\xff\xfe": "UTF-16, expected UTF-8; convert the file",
    b"\xfe\xff": "UTF-16, expected UTF-8; convert the file",
}


@dataclass(frozen=True)
class Line:
    """A document of an input file."""

    file: str
    number: int
    """Number of the line (in parquet and Arrow files: of the row), from 1."""
    text: Row


def check_inputs(files: Iterable[str]) -> None:
    """Check that every input is a file.

    Raises:
        DataError: a file is missing, or is a folder.
    """
    for file in files:
        if Path(file).is_dir():
            raise DataError(
                f"{file}: found a folder, expected files of JSON lines or parquet; name the files"
            )
        if not Path(file).is_file():
            raise DataError(f"{file}: found no such file, expected a JSONL file; check --input")


def lines(files: Iterable[str], limit: int | None) -> Iterator[Line]:
    """Yield the documents of all files in order, at most `limit` of them; blank lines are left out.

    Raises:
        DataError: a file is of no known format, or is damaged; the message names file and line.
    """
    every = (Line(file, number, row) for file in files for number, row in _rows(file))
    return islice(every, limit)


def _rows(file: str) -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        for number, row in _rows_unguarded(file):
            yield number, row
    except DataError:
        raise
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise DataError(
            f"{file}: found a file that pyarrow reads, and no pyarrow; install pyarrow, or convert to "
            "JSON lines"
        ) from error
    except Exception as error:  # gzip, lzma, zlib and Arrow have errors of their own, below no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{file}:{number + 1}: found a file that cannot be read from here on ({reason}), expected a "
            "whole one; fetch or compress the file again"
        ) from error


def _rows_unguarded(file: str) -> Iterator[tuple[int, Row]]:
    with open(file, "rb") as stream:
        begin = stream.peek(8)[:8]
    if begin.startswith(b"PAR1"):
        yield from enumerate(_parquet(file), 1)
        return
    if begin.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        yield from enumerate(_arrow(file, begin.startswith(b"ARROW1")), 1)
        return
    with _opened(file, begin) as stream:
        start = stream.peek(8)[:8]
        for mark, reason in _REFUSED.items():
            if start.startswith(mark):
                raise DataError(f"{file}: found {reason}")
        if start.startswith(_BYTE_ORDER_MARK):
            stream.read(len(_BYTE_ORDER_MARK))
        yield from _json_rows(file, stream)


def _opened(file: str, begin: bytes) -> io.BufferedReader:
    if begin.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.open(file, "rb"))
    if begin.startswith(b"BZh"):
        return io.BufferedReader(bz2.open(file, "rb"))
    if begin.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.open(file, "rb"))
    if begin.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # Python's own library reads zstd from 3.14 on

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(file), "zstd"))
    return open(file, "rb")


def _json_rows(file: str, stream: IO[bytes]) -> Iterator[tuple[int, Row]]:
    numbered = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    if first[1].lstrip().startswith(b"["):
        yield from _array(file, first[0], _Rejoined(first[1], stream))
        return
    yield first
    yield from numbered


class _Rejoined:
    """The characters of a stream whose first line was read already."""

    def __init__(self, first: bytes, rest: IO[bytes]) -> None:
        self.first, self.rest = first, rest
        self.decode = codecs.getincrementaldecoder("utf-8")().decode

    def read(self, count: int) -> str:
        """Return about `count` further characters, and none only at the end of the stream."""
        while True:
            data, self.first = self.first or self.rest.read(count), b""
            text = self.decode(data, final=not data)
            if text or not data:
                return text


def _array(file: str, line: int, stream: _Rejoined) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON array, each with the line on which the object begins.

    The array is never held as a whole: text is read until an element is complete.
    """
    decode = json.JSONDecoder().raw_decode
    text, ended = stream.read(_CHARACTERS_AT_A_TIME), False
    begin = text.index("[") + 1
    line += text.count("\n", 0, begin)
    separator = ""  # what comes before the next element

    def wrong(reason: str) -> DataError:
        return DataError(f"{file}:{line}: {reason}, expected a JSON array of objects; mend the file")

    while True:
        rest = text[begin:]
        blank = len(rest) - len(rest.lstrip())
        line += rest.count("\n", 0, blank)
        text, begin = rest[blank:], 0
        if not text and not ended:
            text = stream.read(_CHARACTERS_AT_A_TIME)
            ended = not text
            continue
        if not text:
            raise wrong("found an array without its end")
        if text[0] == "]" and separator in ("", "element"):
            if text[1:].strip() or stream.read(_CHARACTERS_AT_A_TIME).strip():
                raise wrong("found text after the end of an array")
            return
        if separator == "element":
            if text[0] != ",":
                raise wrong("found no comma after an element of an array")
            separator, begin = ",", 1
            continue
        try:
            element, begin = decode(text)
            if begin == len(text) and not ended:  # a number may go on
                raise json.JSONDecodeError("more may follow", text, begin)
        except (json.JSONDecodeError, RecursionError) as error:
            # Read twice as much each time, so that a long element is not parsed once for each piece of it.
            more = "" if isinstance(error, RecursionError) else stream.read(max(len(text), 4096))
            if not more and (ended or isinstance(error, RecursionError)):
                raise wrong(f"found an element that is no JSON ({str(error)[:80]})") from error
            ended = not more
            text += more
            continue
        if not isinstance(element, dict):
            raise wrong(f"found a JSON {type(element).__name__} in an array")
        yield line, element
        line += text.count("\n", 0, begin)
        separator = "element"


def _parquet(file: str) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as source:
        for batch in source.iter_batches(batch_size=_ROWS_AT_A_TIME):
            yield from map(_without_nulls, batch.to_pylist())


def _arrow(file: str, is_file: bool) -> Iterator[dict[str, Any]]:
    import pyarrow

    with pyarrow.OSFile(file) as source:
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        for batch in batches:
            for begin in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                yield from map(_without_nulls, batch.slice(begin, _ROWS_AT_A_TIME).to_pylist())


def _without_nulls(value: Any) -> Any:
    """Drop the null fields of objects: a column has one type, so each object has the fields of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
