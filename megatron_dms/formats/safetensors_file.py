"""Read safetensors files with every length checked, and write them as a stream.

The library's `save_file` wants all tensors of a file in memory at once, and its reader maps the file. The
format is simple enough to do neither: 8 bytes of header length, a JSON header with dtype, shape and place of
each tensor, then their bytes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_dms.errors import CheckpointError

_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the library's own limit
_ALIGNMENT = 8  # bytes; the library pads the header so that the data start aligned


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor. offset: of its first byte in the file; 0 for a tensor yet to be
    written.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = field(default=0, compare=False)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return names, types, shapes and places of the tensors in a file. Raises CheckpointError if it is cut
    short, if tensors overlap or leave gaps, or if one has another type.
    """
    try:
        size, stream = path.stat().st_size, path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    with stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(
                f"{path} is truncated or no safetensors file ({size} bytes); fetch it again"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            places = [(*entry["data_offsets"], name) for name, entry in header.items()]
            types = {name: str(entry["dtype"]) for name, entry in header.items()}
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            for begin, after, name in places:
                if any(type(number) is not int or number < 0 for number in (begin, after, *shapes[name])):
                    raise ValueError(name)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged safetensors header; fetch it again") from error
    infos, end = {}, 0
    for begin, _, name in places:
        if types[name] not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} has type {types[name]}, expected one of {', '.join(_DTYPES)}"
            )
        infos[name] = TensorInfo(path.name, _DTYPES[types[name]], shapes[name], 8 + length + begin)
    for begin, after, name in sorted(places):
        if begin != end or after - begin != infos[name].nbytes:
            raise CheckpointError(f"{path}: the header puts {name} at a wrong place; fetch the file again")
        end = after
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path} has {size} bytes, its header needs {8 + length + end}: truncated? fetch it again"
        )
    return infos


def write_pieces(stream: BinaryIO, pieces: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Write contiguous tensors one after the other; returns the number of bytes."""
    written = 0
    for piece in pieces:
        if piece.dtype != dtype:
            raise RuntimeError(f"got {piece.dtype}, announced {dtype}")
        written += stream.write(piece.reshape(-1).view(torch.uint8).numpy().data)
    return written


def write_file(
    path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Iterable[Tensor]]]
) -> None:
    """Write a file from a stream of (name, the tensor in contiguous pieces), in the order of `infos`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for name, info in infos.items():
        end = offset + info.nbytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, pieces), (expected, info) in zip(tensors, infos.items(), strict=True):
            written = write_pieces(stream, pieces, info.dtype)
            if name != expected or written != info.nbytes:
                raise RuntimeError(f"{path.name}: got {written} bytes of {name}, not those of {expected}")
