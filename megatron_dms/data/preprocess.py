"""JSONL → Megatron's .bin/.idx with a loss mask: streaming, over several processes, all or nothing.

The files are read once, in order, and never held in memory: lines go out in chunks to worker processes and
come back as token ids, in the order they were read, so the result does not depend on the number of workers.
Everything is written into a hidden folder beside the output and renamed at the end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from megatron_dms.data.chat_encoder import DocumentEncoder
from megatron_dms.data.line_workers import Documents, Line, encode_here, encode_in_workers
from megatron_dms.data.token_files import loss_mask_prefix
from megatron_dms.errors import DataError

# Large enough that sending a chunk costs nothing beside encoding it, small enough that progress moves and
# that the workers end at about the same time.
_CHUNK_LINES = 64


@dataclass(frozen=True)
class PreprocessConfig:
    """What to make out of what."""

    inputs: tuple[str, ...]
    """JSONL files, read in this order."""
    tokenizer: str
    """Directory of the HF tokenizer."""
    output_prefix: str
    """Path of the output without ".bin"; existing files of that name are replaced at the end."""
    loss_on: str = "assistant"
    """Which tokens of a chat are prediction targets: "assistant" or "all"."""
    chat_template: str | None = None
    """A Jinja template (the text) in place of the tokenizer's own."""
    workers: int = 1
    """Number of processes that encode; 1 encodes in this one."""
    max_documents: int | None = None
    """Read at most this many documents; None reads all."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("--input: found no file, expected at least one; name a JSONL file")
        if self.workers < 1:
            raise ValueError(f"--workers: found {self.workers}, expected at least 1")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"--max-documents: found {self.max_documents}, expected at least 1")


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
    """Documents left out because they hold no target."""


def preprocess(config: PreprocessConfig, progress: Callable[[Summary], None] | None = None) -> Summary:
    """Encode every line of config.inputs and write the four files of config.output_prefix.

    Args:
        progress: called after each chunk of lines with the summary so far.

    Raises:
        DataError: a line that is no document ("FILE:LINE: …"), no document at all, or a worker that died.
        ValueError: the tokenizer is unusable.
        OSError: a file cannot be read or written.
    """
    for file in config.inputs:
        if not Path(file).is_file():
            raise DataError(f"{file}: found no such file, expected a JSONL file; check --input")
    encoder = DocumentEncoder(config.tokenizer, config.loss_on, config.chat_template)
    chunks = _chunks(_lines(config.inputs, config.max_documents))
    if config.workers == 1:
        encoded = encode_here(encoder, chunks)
    else:
        encoded = encode_in_workers(encoder, chunks, config.workers)
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
        encoded.close()  # ends the workers
        shutil.rmtree(folder)
    return summary


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
        for ids, mask in documents:
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


def _lines(files: Iterable[str], limit: int | None) -> Iterator[Line]:
    """The lines that are not blank, at most `limit` of them."""
    return islice(
        (
            Line(file, number, text)
            for file in files
            for number, text in enumerate(_raw_lines(file), start=1)
            if text.strip()
        ),
        limit,
    )


def _raw_lines(file: str) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        yield from stream


def _chunks(lines: Iterator[Line]) -> Iterator[list[Line]]:
    while chunk := list(islice(lines, _CHUNK_LINES)):
        yield chunk


class ProgressLine:
    """Says how far preprocessing is, at most every `interval` seconds, through `say`."""

    def __init__(self, say: Callable[[str], None], interval: float = 2.0) -> None:
        self.say = say
        self.interval = interval
        self.first: tuple[float, int] | None = (
            None  # time and documents at the first call, when all is loaded
        )
        self.last = time.monotonic()

    def __call__(self, summary: Summary) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, summary.documents)
        elif now - self.last >= self.interval:
            self.last = now
            rate = (summary.documents - self.first[1]) / (now - self.first[0])
            self.say(f"{summary.documents} documents, {summary.tokens} tokens, {rate:.0f} documents/s")
