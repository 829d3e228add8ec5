"""Read W&B's offline files: the history that its server would make of them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FILE_HEADER = 32768, struct.Struct("<IHB"), 7
_FULL, _LAST = 1, 4  # types of record pieces


def synced(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the history of each run id. Its files are read in the order in which they were begun.

    A rewind drops the points beyond its step, as W&B's documents say that the server does (wandb 0.31).
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("**/offline-run-*/*.wandb")):
        for record in _records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run.run_id
                history = runs.setdefault(run, [])
                if record.run.HasField("branch_point"):
                    moment = record.run.branch_point
                    assert (moment.run, moment.metric) == (run, "_step")
                    history[:] = [row for row in history if row["_step"] <= moment.value]
            elif kind == "history":
                items = record.history.item
                history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return runs


def _records(path: Path) -> Iterator[Any]:
    """Yield the records of a log in LevelDB's format: blocks of pieces with a checksum, a length and a
    type."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), _FILE_HEADER, b""
    while position + _HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        parts += data[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""
