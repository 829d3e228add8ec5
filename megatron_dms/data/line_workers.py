"""Encoding chunks of lines, in this process or in several, in order."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from megatron_dms.data.chat_encoder import DocumentEncoder, LineError
from megatron_dms.errors import DataError

Documents = list[tuple[np.ndarray, np.ndarray]]  # ids [n] int32 and mask [n] uint8 of each document


@dataclass(frozen=True)
class Line:
    """A line of an input file."""

    file: str
    number: int  # from 1
    text: bytes


def _encode_chunk(encoder: DocumentEncoder, chunk: list[Line]) -> Documents:
    documents = []
    for line in chunk:
        try:
            documents.append(encoder.encode(line.text))
        except LineError as error:
            raise DataError(f"{line.file}:{line.number}: {error}") from error
    return documents


def encode_here(encoder: DocumentEncoder, chunks: Iterator[list[Line]]) -> Generator[Documents, None, None]:
    """Encode in this process."""
    for chunk in chunks:
        yield _encode_chunk(encoder, chunk)


def encode_in_workers(
    encoder: DocumentEncoder, chunks: Iterator[list[Line]], workers: int
) -> Generator[Documents, None, None]:
    """Encode in `workers` processes, one chunk ahead of the caller in each.

    Chunk i goes to worker i mod N and comes back from there, so order is kept without sorting.

    At most one chunk is out per worker: a worker that waits to hand over a result would not read the next
    chunk, and a parent that waits to send it would not take the result.

    Raises:
        DataError: a line is no document, or a worker died.
    """
    # Not "fork": a forked child would inherit the locks of the parent's threads (the tokenizer's, torch's).
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_worker, args=(theirs, encoder), daemon=True)
            worker.start()
            theirs.close()
            pipes.append(ours)
            processes.append(worker)
        waiting: list[list[Line] | None] = [None] * workers
        turn = 0
        for chunk in chunks:
            if (earlier := waiting[turn]) is not None:
                documents = _receive(pipes[turn], earlier)
                _send(pipes[turn], chunk)
                waiting[turn] = chunk
                yield documents
            else:
                _send(pipes[turn], chunk)
                waiting[turn] = chunk
            turn = (turn + 1) % workers
        for offset in range(workers):
            worker_index = (turn + offset) % workers
            if (earlier := waiting[worker_index]) is not None:
                yield _receive(pipes[worker_index], earlier)
    finally:
        for worker in processes:  # before their pipes close, or they would complain
            worker.terminate()
        for worker in processes:
            worker.join()
        for pipe in pipes:
            pipe.close()


def _send(pipe: Connection, chunk: list[Line]) -> None:
    try:
        pipe.send(chunk)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise _died(chunk) from error


def _receive(pipe: Connection, chunk: list[Line]) -> Documents:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise _died(chunk) from error
    if isinstance(answer, DataError):
        raise answer
    return answer


def _died(chunk: list[Line]) -> DataError:
    first, last = chunk[0], chunk[-1]
    return DataError(
        f"{first.file}:{first.number}: found a dead worker process while encoding up to "
        f"{last.file}:{last.number}, expected it to answer; "
        "its own message is above, or memory ran out: use fewer --workers"
    )


def _worker(pipe: Connection, encoder: DocumentEncoder) -> None:
    """Encode chunks until the other end of the pipe closes."""
    # Ctrl-C goes to the whole process group; the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            chunk = pipe.recv()
        except EOFError:
            return
        try:
            answer: object = _encode_chunk(encoder, chunk)
        except DataError as error:
            answer = error
        pipe.send(answer)
