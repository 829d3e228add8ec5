"""Safetensors files, read with every length checked and written as a stream.

The library's `save_file` wants all tensors of a file in memory at once. The format is simple enough to
write one tensor at a time: 8 bytes of header length, a JSON header with dtype, shape and place of each
tensor, then their bytes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dms.checkpoint.errors import CheckpointError

_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes; the library's own limit
_ALIGNMENT = 8  # bytes; the library pads the header so that the data start aligned


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes in a file. Raises CheckpointError if it is cut short or holds another type."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(
                f"{path} is truncated or no safetensors file ({size} bytes); fetch it again"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged safetensors header; fetch it again") from error
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != needed:
        raise CheckpointError(
            f"{path} has {size} bytes, its header needs {needed}: truncated? fetch it again"
        )
    infos = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} has type {entry['dtype']}, expected one of {', '.join(_DTYPES)}"
            )
        infos[name] = TensorInfo(path.name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return infos


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, read from the file as it is."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot read {name}: {error}") from error


def write_file(path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write a file from a stream of (name, tensor), in the order of `infos`; returns its size in bytes."""
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
        for (name, tensor), (expected, info) in zip(tensors, infos.items(), strict=True):
            if name != expected or tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
                raise RuntimeError(f"{path.name}: the stream gave {name}, {expected} was announced")
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return stream.tell()
