"""JSONL → Megatron's .bin/.idx with a loss mask: streaming, over several processes, all or nothing.

The files are read once, in order, and never held in memory. Lines go out in chunks to worker processes and
come back as token ids in the order in which they were read, so the result does not depend on the number of
workers. Everything is written into a hidden folder beside the output and renamed at the end.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np

from megatron_dms.data.chat_encoder import Document, DocumentEncoder
from megatron_dms.data.input_files import Line, check_inputs, lines
from megatron_dms.data.line_error import LineError
from megatron_dms.data.token_files import loss_mask_prefix
from megatron_dms.errors import DataError
from megatron_dms.processes import end_with_parent

# Large enough that sending a chunk costs nothing beside encoding it, small enough that progress moves and
# that the workers end at about the same time.
_CHUNK_LINES = 64
_CHUNKS_AHEAD = 2  # chunks out for each worker: one under way, one that waits

Documents = list[Document]


@dataclass(frozen=True)
class PreprocessConfig:
    """Which files to read, how to encode them, and what to write."""

    inputs: tuple[str, ...]
    """Files of JSON lines, a JSON array, parquet or Arrow, compressed or not; read in this order."""
    tokenizer: str
    """Directory of the HF tokenizer."""
    output_prefix: str
    """Path of the output without ".bin"; existing files of that name are replaced at the end."""
    loss_on: str = "assistant"
    """Which tokens of a chat, or of a prompt and completion, are prediction targets: "assistant" or "all"."""
    chat_template: str | None = None
    """A Jinja template (the text) in place of the tokenizer's own."""
    fields: tuple[str, ...] = ()
    """The columns to read: none (the known forms), one, or a prompt's and a completion's."""
    drop_fields: tuple[str, ...] = ()
    """Columns, and fields of messages, to leave out and count."""
    workers: int = 1
    """Number of processes that encode; 1 encodes in this process."""
    max_documents: int | None = None
    """Read at most this many documents; None reads all."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("--input: found no file, expected at least one; name a JSONL file")
        if self.workers < 1:
            raise ValueError(f"--workers: found {self.workers}, expected at least 1")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"--max-documents: found {self.max_documents}, expected at least 1")
        if len(self.fields) > 2:
            raise ValueError(
                f"--field: found {len(self.fields)} columns, expected one, or a prompt's and a completion's"
            )
        if self.output_prefix.endswith(os.sep) or Path(self.output_prefix).is_dir():
            name = Path(self.inputs[0]).name.split(".")[0] or "data"
            raise ValueError(
                f"--output-prefix: found the folder {self.output_prefix}, expected the beginning of file "
                f"names, without .bin; give {Path(self.output_prefix) / name}"
            )


@dataclass
class Summary:
    """What was written."""

    documents: int = 0
    """Documents written, one per JSONL line."""
    tokens: int = 0
    """Tokens of these documents."""
    target_tokens: int = 0
    """Tokens that training predicts: loss mask 1, the first token of each document left out."""
    skipped: int = 0
    """Documents left out because they hold no target token."""
    not_in_tokens: dict[str, int] = field(default_factory=dict)
    """In how many documents a column, or a field of messages, went into no token."""


def preprocess(config: PreprocessConfig, progress: Callable[[Summary], None] | None = None) -> Summary:
    """Encode every line of config.inputs and write the four files of config.output_prefix.

    Args:
        progress: called after each chunk of lines with the summary so far.

    Raises:
        DataError: a line that is no document ("FILE:LINE: …"), no document at all, or a worker died.
        ValueError: the tokenizer is unusable.
        OSError: a file cannot be read or written.
    """
    check_inputs(config.inputs)
    encoder = DocumentEncoder(
        config.tokenizer, config.loss_on, config.chat_template, config.fields, config.drop_fields
    )
    chunks = _chunks(lines(config.inputs, config.max_documents))
    if config.workers == 1:
        encoded = _encode_here(encoder, chunks)
    else:
        encoded = _encode_in_workers(encoder, chunks, config.workers)
    target = Path(config.output_prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        summary = _write(encoded, str(folder / target.name), encoder.vocab_size, progress)
        if not summary.documents:
            raise DataError(
                f"{', '.join(config.inputs)}: found no document with a prediction target, expected at least "
                "one; give files with assistant messages or text, or --loss-on all"
            )
        _publish(folder, target)
    finally:
        try:
            encoded.close()  # ends the workers
        finally:
            shutil.rmtree(folder)
    return summary


def _encode_here(encoder: DocumentEncoder, chunks: Iterator[list[Line]]) -> Generator[Documents, None, None]:
    for chunk in chunks:
        yield _encode_chunk(encoder, chunk)


def _encode_chunk(encoder: DocumentEncoder, chunk: list[Line]) -> Documents:
    documents = []
    for line in chunk:
        try:
            documents.append(encoder.encode_document(line.text))
        except LineError as error:
            raise DataError(f"{line.file}:{line.number}: {error}") from error
    return documents


def _encode_in_workers(
    encoder: DocumentEncoder, chunks: Iterator[list[Line]], workers: int
) -> Generator[Documents, None, None]:
    """Encode in `workers` processes, a few chunks ahead of the caller, in the order of the chunks.

    Raises:
        DataError: a line is no document, or a worker died.
    """
    # Not "fork": a forked child would inherit the locks of the parent's threads (the tokenizer's, torch's).
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (encoder,))
    waiting: deque[tuple[list[Line], Future[Documents]]] = deque()
    finished = False
    try:
        for chunk in chunks:
            if len(waiting) == workers * _CHUNKS_AHEAD:
                yield waiting[0][1].result()
                waiting.popleft()
            waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
        finished = True
    except BrokenProcessPool as error:
        raise _died(waiting[0][0][0], waiting[-1][0][-1]) from error
    finally:
        if not finished:  # a shutdown waits for the chunks under way, and for a worker that hangs
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
        pool.shutdown(cancel_futures=True)


def _died(first: Line, last: Line) -> DataError:
    """Return the error of a worker that gave no documents for these lines."""
    return DataError(
        f"{first.file}:{first.number}: found a dead worker process while encoding up to "
        f"{last.file}:{last.number}, expected it to answer; "
        "its own message is above, or memory ran out: use fewer --workers"
    )


_encoder: DocumentEncoder | None = None
"""The encoder of a worker process, which gets it once and not with each chunk."""


def _begin_worker(encoder: DocumentEncoder) -> None:
    global _encoder
    # Ctrl-C goes to the whole process group; the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    _encoder = encoder


def _encode_in_worker(chunk: list[Line]) -> Documents:
    if _encoder is None:
        raise RuntimeError("the worker process has no encoder")
    try:
        return _encode_chunk(_encoder, chunk)
    except DataError:
        raise
    except Exception as error:  # a fault of the tokenizer, say
        traceback.print_exc()
        raise _died(chunk[0], chunk[-1]) from error


def _write(
    encoded: Iterable[Documents],
    prefix: str,
    vocab_size: int,
    progress: Callable[[Summary], None] | None,
) -> Summary:
    # The first chunk before the import, which takes seconds: the workers start meanwhile, and a file that is
    # wrong from its first lines on is refused at once. (At the top, every worker would import it too.)
    encoded = iter(encoded)
    first = list(islice(encoded, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, about Apex and the like: nothing that matters here
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    summary = Summary()
    tokens = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    masks = IndexedDatasetBuilder(f"{loss_mask_prefix(prefix)}.bin", dtype=np.uint8)
    for documents in chain(first, encoded):
        for ids, mask, left_out in documents:
            for name in set(left_out):
                summary.not_in_tokens[name] = summary.not_in_tokens.get(name, 0) + 1
            targets = int(mask[1:].sum())
            if not targets:
                summary.skipped += 1
                continue
            tokens.add_document(ids, [len(ids)])
            masks.add_document(mask, [len(mask)])
            summary.documents += 1
            summary.tokens += len(ids)
            summary.target_tokens += targets
        if progress is not None:
            progress(summary)
    tokens.finalize(f"{prefix}.idx")
    masks.finalize(f"{loss_mask_prefix(prefix)}.idx")
    return summary


def _publish(folder: Path, target: Path) -> None:
    """Rename the four finished files into place.

    Four renames are not one: the old indexes go first and the new token index comes last, so that a reader
    finds the old set, or no index (an error that says so), or the new set, and never halves of two.
    """
    mask = loss_mask_prefix(target.name)
    for name in (f"{target.name}.idx", f"{mask}.idx"):
        (target.parent / name).unlink(missing_ok=True)
    for name in (f"{target.name}.bin", f"{mask}.bin", f"{mask}.idx", f"{target.name}.idx"):
        os.replace(folder / name, target.parent / name)


def _chunks(found: Iterator[Line]) -> Iterator[list[Line]]:
    while chunk := list(islice(found, _CHUNK_LINES)):
        yield chunk


class ProgressLine:
    """Says how far preprocessing is, at most once every `interval` seconds.

    Args:
        say: called with the line.
        interval: seconds.
    """

    def __init__(self, say: Callable[[str], None], interval: float = 2.0) -> None:
        self.say = say
        self.interval = interval
        # Time and documents at the first call: by then everything is loaded.
        self.first: tuple[float, int] | None = None
        self.last = time.monotonic()

    def __call__(self, summary: Summary) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, summary.documents)
        elif now - self.last >= self.interval:
            self.last = now
            rate = (summary.documents - self.first[1]) / (now - self.first[0])
            self.say(f"{summary.documents} documents, {summary.tokens} tokens, {rate:.0f} documents/s")
