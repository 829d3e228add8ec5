"""Tensors on disk, read a few rows at a time: what a conversion moves from file to file.

Every row of a name table (conversion/transforms.py) only reorders the rows (axis 0) of its parts. So no
tensor need be in memory: a conversion is a list of `Span`s, read, looked at and written in pieces that stay
in a core's cache. That is both the smallest and, measured, the fastest way: fresh pages and a second trip
through memory cost more than the reading itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_dms.errors import CheckpointError

Shape = tuple[int, ...]

_PIECE_BYTES = 2**20
"""Read and written at once; a core's L2 cache holds it."""


class RowSource(Protocol):
    """A tensor [R, ...] on disk."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read_into(self, start: int, out: Tensor) -> None:
        """Fill `out` [n, ...], contiguous and of the same type, with rows start ... start + n."""


@dataclass(frozen=True)
class FileRows:
    """A tensor whose bytes lie at `offset` of a file, row after row."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape

    def read_into(self, start: int, out: Tensor) -> None:
        """See RowSource. Raises CheckpointError if the file ends before or cannot be read."""
        place = self.offset + start * prod(self.shape[1:]) * self.dtype.itemsize
        left = memoryview(out.view(-1).view(torch.uint8).numpy())
        try:
            # read, not mapped: mapped pages would count as memory of this process
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(place)
                while left:
                    count = stream.readinto(left)
                    if not count:
                        raise CheckpointError(f"{self.path} ends in the middle of a tensor; fetch it again")
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compared as bits: NaN equals itself, and -0 is not 0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def read_all(source: RowSource) -> Tensor:
    """The whole tensor."""
    out = torch.empty(source.shape, dtype=source.dtype)
    source.read_into(0, out)
    return out


@dataclass(frozen=True)
class Span:
    """Rows start ... start + count of a source, belonging to the HF tensor `name`."""

    name: str
    source: RowSource
    start: int
    count: int

    def pieces(self) -> Iterator[Tensor]:
        """The rows in order. Each piece is valid until the next one is asked for: they share their memory."""
        row = self.source.shape[1:]
        most = max(1, _PIECE_BYTES // (prod(row) * self.source.dtype.itemsize))
        buffer = torch.empty(min(most, self.count), *row, dtype=self.source.dtype)
        for done in range(0, self.count, most):
            piece = buffer[: min(most, self.count - done)]
            self.source.read_into(self.start + done, piece)
            yield piece
