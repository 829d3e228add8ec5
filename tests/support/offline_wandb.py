"""What W&B's offline files would make of a run on its server."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FILE_HEADER = 32768, struct.Struct("<IHB"), 7
_FULL, _LAST = 1, 4  # types of record pieces


def synced(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The history of each run id, its files read in the order of their start: a rewind drops the points
    beyond its step. (wandb 0.31; the rewinding itself is the server's, and follows W&B's documents.)"""
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
    """The file is a log in LevelDB's format: blocks of pieces, each with checksum, length and type."""
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
