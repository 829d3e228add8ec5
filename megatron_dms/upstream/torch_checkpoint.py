"""torch's distributed checkpoints (DCP) and `torch.save`'s files, taken apart without a process group.

`torch.save` writes an envelope (a zip archive with a pickle) around the bytes of a tensor. The functions here
write and read the envelope alone, so that the bytes themselves can be streamed.
"""

import io
from dataclasses import is_dataclass
from enum import Enum
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import skip_data

Place = filesystem._StorageInfo
"""Where DCP's metadata say that something is: relative_path, offset, length, transform_descriptors."""


class _Writer(FileSystemWriter):
    """DCP's writer of `.metadata`, less the output's path and a random id: the same input gives the same
    bytes.
    """

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def write_metadata(folder: Any, metadata: Metadata, results: list[WriteResult]) -> None:
    """Write a checkpoint's `.metadata`, without fsync.

    Args:
        results: the place (a Place) of everything that the metadata name.
    """
    _Writer(folder, sync_files=False).finish(metadata, [results])


class _Envelope(io.BytesIO):
    """Takes what `torch.save` writes around a tensor's bytes; `skip_data` makes it seek over the bytes."""

    hole: int | None = None
    skipped = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_CUR or self.hole is not None:
            raise RuntimeError("torch.save seeks in a way that torch 2.14 does not")
        self.hole, self.skipped = self.tell(), offset
        return self.hole + offset


def envelope(sizes: torch.Size, dtype: torch.dtype) -> tuple[memoryview, int, memoryview]:
    """What `torch.save` writes around a tensor's bytes.

    Returns:
        What comes before the bytes, the number of bytes, and what comes after them.
    """
    around = _Envelope()
    with skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), around)  # memory never touched, so never taken
    view = memoryview(around.getvalue())
    return view[: around.hole], around.skipped, view[around.hole :]


def read_envelope(stream: io.IOBase, place: Place) -> tuple[Tensor, int]:
    """Read the envelope of a stored tensor.

    Returns:
        A tensor with the stored one's shape, type and strides, whose values are memory that was never
        touched, and the offset in the file at which its storage's bytes begin.
    """
    # Annotated as IOBase, which torch.load does not take by its own annotation.
    view: Any = _create_file_view(stream, place.offset, place.length)
    with skip_data():  # the values' memory is reserved only, neither read nor touched
        tensor = torch.load(view, map_location="cpu", weights_only=True)
    view.seek(0)
    reader = torch._C.PyTorchFileReader(view)
    offset = reader.get_record_offset("data/0")  # type: ignore[attr-defined]  # torch's stub leaves it out
    return tensor, place.offset + offset


def archive_members(stream: IO[bytes]) -> list[str]:
    """The names of the parts of what `torch.save` wrote."""
    return torch._C.PyTorchFileReader(stream).get_all_records()


def metadata_class(module: str, name: str) -> Any:
    """The class or function of torch's that a `.metadata` pickle may name; None for any other."""
    for known in (dcp, planner, filesystem):
        found = getattr(known, name, None) if known.__name__ == module else None
        if isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum)):
            return found
    if (module, name) == ("torch.serialization", "_get_layout"):
        return torch.serialization._get_layout  # a look-up in a table
    return None


def is_tensor_builder(module: str, name: str) -> bool:
    """Whether a pickle that names this function asks for a tensor or a parameter, and for nothing else."""
    return module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter")
