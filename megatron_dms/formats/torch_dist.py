"""Megatron's torch_dist format, read and written without Megatron, without process groups, a few rows at a
time.

It is PyTorch's distributed checkpoint (torch.distributed.checkpoint, DCP): `.metadata` (a pickle of names,
shapes and places), `*.distcp` (the tensors, each as `torch.save` writes it), and Megatron's `metadata.json`.
Checked on megatron-core 0.19.2, torch 2.13 and 2.14:
- layers of a model share a key and have a leading layer axis; each layer is a chunk [1, ...] of it;
- everything that is no tensor sits in one object under the key `common_state/shard_0_1`, saved by
  `torch.save([...])`;
- each parallel linear layer (and each norm of Transformer Engine) asks on loading for an object
  `<module>._extra_state/shard_<layer>_<layers>`, whose content is None without FP8.
"""

import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dms.errors import CheckpointError
from megatron_dms.formats import plain_pickle
from megatron_dms.formats.safetensors_file import write_pieces
from megatron_dms.formats.tensor_rows import FileRows, read_all
from megatron_dms.upstream import torch_checkpoint

COMMON_STATE = "common_state/shard_0_1"
_METADATA_JSON = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_DATA_FILE = "__0_0.distcp"  # DCP's name for the first file of the first process


@dataclass(frozen=True)
class Chunk:
    """One tensor to write: all of `key`, or layer `layer` of `layers` of it. `pieces` is called when its turn
    comes, and gives its rows in order, as contiguous tensors.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]
    layer: int | None = None
    layers: int | None = None

    @property
    def sizes(self) -> torch.Size:
        """The shape with the layer axis in front where there is one."""
        return torch.Size([*(() if self.layer is None else (1,)), *self.shape])

    def write_item(self) -> WriteItem:
        """Return DCP's description of the chunk."""
        lead, axis = ((), ()) if self.layer is None else ((self.layer,), (self.layers,))
        offsets = torch.Size([*lead, *(0 for _ in self.shape)])
        return WriteItem(
            index=MetadataIndex(self.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(offsets, self.sizes),
                TensorProperties(self.dtype),
                torch.Size([*axis, *self.shape]),
            ),
        )


def write(folder: Path, chunks: Iterable[Chunk], objects: Iterable[str], common: dict[str, object]) -> None:
    """Write one checkpoint folder (release or iter_...), which must exist, and check it.

    objects: keys of further objects whose content is None. common: what is no tensor, `args` among it.
    """
    chunks = list(chunks)
    blobs = {MetadataIndex(key): _serialized([None]) for key in objects}
    blobs[MetadataIndex(COMMON_STATE)] = _serialized([common])
    items = [WriteItem(index, WriteItemType.BYTE_IO) for index in blobs]
    items += [chunk.write_item() for chunk in chunks]
    _, metadata = create_default_global_save_plan([SavePlan(items)])
    results = []
    contents: list[bytes | Chunk] = [*blobs.values(), *chunks]
    with (folder / _DATA_FILE).open("wb") as stream:
        for item, content in zip(items, contents, strict=True):
            begin = stream.tell()
            if isinstance(content, bytes):
                stream.write(content)
            else:
                _write_tensor(stream, content, content.sizes)
            size = stream.tell() - begin
            place = torch_checkpoint.Place(_DATA_FILE, begin, size)
            results.append(WriteResult(item.index, size, place))
    torch_checkpoint.write_metadata(folder, metadata, results)
    (folder / "metadata.json").write_text(json.dumps(_METADATA_JSON))
    _check_written(Reader(folder), chunks, blobs)


def _write_tensor(stream: io.BufferedWriter, chunk: Chunk, sizes: torch.Size) -> None:
    before, announced, after = torch_checkpoint.envelope(sizes, chunk.dtype)
    stream.write(before)
    written = write_pieces(stream, chunk.pieces(), chunk.dtype)
    if written != announced:
        raise RuntimeError(f"{chunk.key}: made {written} bytes, announced {chunk.dtype} {chunk.shape}")
    stream.write(after)


def _check_written(reader: "Reader", chunks: Sequence[Chunk], blobs: Iterable[MetadataIndex]) -> None:
    """Raises CheckpointError unless everything can be found again, with its shape and in files of the right
    size.
    """
    for chunk in chunks:
        found = reader.rows(chunk.key, chunk.layer)
        if (found.shape, found.dtype) != (chunk.shape, chunk.dtype):
            raise CheckpointError(f"{reader.folder}: {chunk.key} came out as {found.dtype} {found.shape}")
    if reader.objects != sorted(index.fqn for index in blobs):
        raise CheckpointError(f"{reader.folder}: objects came out as {reader.objects}")


def _serialized(content: list[object]) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@dataclass(frozen=True)
class _Shard:
    """A box of a tensor, and of the stored chunk that holds it: offsets and lengths per axis."""

    stored: FileRows
    source: tuple[int, ...]
    target: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class ShardedRows:
    """A tensor that training stored in chunks, one per rank; see tensor_rows.RowSource."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: list[_Shard]

    def read_into(self, start: int, out: Tensor) -> None:
        for shard in self.shards:
            first = max(start, shard.target[0])
            last = min(start + len(out), shard.target[0] + shard.lengths[0])
            if first >= last:
                continue
            place = out[first - start : last - start]
            begin = shard.source[0] + first - shard.target[0]
            if shard.lengths[1:] == shard.stored.shape[1:] == self.shape[1:]:
                shard.stored.read_into(begin, place)
                continue
            rows = torch.empty(last - first, *shard.stored.shape[1:], dtype=self.dtype)
            shard.stored.read_into(begin, rows)
            for axis in range(1, len(self.shape)):
                rows = rows.narrow(axis, shard.source[axis], shard.lengths[axis])
                place = place.narrow(axis, shard.target[axis], shard.lengths[axis])
            place.copy_(rows)


class _MetadataUnpickler(plain_pickle.Unpickler):
    """Builds DCP's records and plain types; what else Megatron put there becomes Opaque, all else is
    refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = torch_checkpoint.metadata_class(module, name)
        if known is not None:
            return known
        found = super().find_class(module, name)
        opaque = isinstance(found, type) and issubclass(found, plain_pickle.Opaque)
        if opaque and module.partition(".")[0] != "megatron":
            raise pickle.UnpicklingError(f"{module}.{name} has no place there")
        return found


class Reader:
    """One checkpoint folder (release or iter_...), as training or `write` left it, at whatever TP x PP x DP.

    tensors: key -> global shape and dtype, the layer axis included. objects: keys of everything else.
    Raises CheckpointError if the folder is half-written: no metadata, or a file missing or shorter than it
    must be. Nothing that a file names is ever run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("metadata.json", ".metadata"):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name} is missing: the checkpoint is half-written or not in torch_dist format"
                )
        try:
            backend = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
            with (folder / ".metadata").open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"found {type(metadata).__name__}")
            everything = metadata.state_dict_metadata
            self.tensors = {
                key: md for key, md in everything.items() if isinstance(md, TensorStorageMetadata)
            }
            self._places: dict[MetadataIndex, torch_checkpoint.Place] = dict(metadata.storage_data)
            self._needed: dict[str, int] = {}
            for place in self._places.values():
                if Path(place.relative_path).name != place.relative_path:
                    raise ValueError(f"{place.relative_path} is no file of this folder")
                end = max(self._needed.get(place.relative_path, 0), place.offset + place.length)
                self._needed[place.relative_path] = end
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise CheckpointError(
                f"{folder}: metadata is damaged ({type(error).__name__}: {error})"
            ) from error
        unplaced = [index for index in self._chunks_and_objects(everything) if index not in self._places]
        if unplaced:
            raise CheckpointError(
                f"{folder}: the metadata do not say where {unplaced[0].fqn} is; half-written?"
            )
        if backend != "torch_dist":
            raise CheckpointError(
                f"{folder} has format {backend!r}, expected 'torch_dist' (--ckpt-format torch_dist)"
            )
        self.objects = sorted(set(everything) - set(self.tensors))
        self._check_files()

    @staticmethod
    def _chunks_and_objects(everything: Mapping[str, object]) -> Iterator[MetadataIndex]:
        for key, md in everything.items():
            if isinstance(md, TensorStorageMetadata):
                yield from (MetadataIndex(key, chunk.offsets) for chunk in md.chunks)
            else:
                yield MetadataIndex(key)

    def _check_files(self) -> None:
        for name, size in sorted(self._needed.items()):
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing: the checkpoint is half-written or was copied in part"
                )
            if path.stat().st_size < size:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected {size}: truncated")

    def rows(self, key: str, layer: int | None = None) -> ShardedRows:
        """Return `key`, or one layer of it without the layer axis, to be read row by row."""
        stored = self.tensors[key]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        covered = sum(item.lengths.numel() for item in items)
        if covered != wanted.sizes.numel():
            raise CheckpointError(
                f"{self.folder}: {key} has {covered} of {wanted.sizes.numel()} values; half-written?"
            )
        lead = 0 if layer is None else 1
        shapes: dict[torch.Size | None, torch.Size] = {chunk.offsets: chunk.sizes for chunk in stored.chunks}
        shards = []
        for item in items:
            shape = shapes[item.storage_index.offset]
            chunk = self._chunk(key, item.storage_index, stored.properties.dtype, shape)
            if lead:
                skipped = item.storage_offsets[0] * prod(chunk.shape[1:]) * chunk.dtype.itemsize
                chunk = FileRows(chunk.path, chunk.offset + skipped, chunk.dtype, chunk.shape[1:])
            boxes = (item.storage_offsets, item.dest_offsets, item.lengths)
            shards.append(_Shard(chunk, *(tuple(box)[lead:] for box in boxes)))
        return ShardedRows(wanted.sizes[lead:], stored.properties.dtype, shards)

    def _chunk(self, key: str, index: MetadataIndex, dtype: torch.dtype, shape: torch.Size) -> FileRows:
        """Return the values of a stored chunk, which begin somewhere within what torch.save wrote."""
        place = self._places[index]
        path = self.folder / place.relative_path
        try:
            if place.transform_descriptors:
                raise ValueError(f"stored through {place.transform_descriptors}, expected plain bytes")
            with path.open("rb") as stream:
                tensor, start = torch_checkpoint.read_envelope(stream, place)
            if (tensor.dtype, tensor.shape) != (dtype, shape) or not tensor.is_contiguous():
                raise ValueError(
                    f"found {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, expected "
                    f"{dtype} {tuple(shape)} without gaps"
                )
        except Exception as error:  # torch.load of damaged bytes can raise nearly anything
            raise CheckpointError(
                f"{self.folder}: cannot read {key} ({type(error).__name__}: {error})"
            ) from error
        start += int(tensor.storage_offset()) * dtype.itemsize
        return FileRows(path, start, dtype, tensor.shape)

    def tensor(self, key: str, layer: int | None = None) -> Tensor:
        """Read the whole of `key`, or one layer of it without the layer axis."""
        return read_all(self.rows(key, layer))

    def common(self) -> dict[str, object]:
        """Read the objects that are no tensors: `args`, `iteration` and so on."""
        found = self._common()
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{self.folder} holds {type(found).__name__} for its arguments, expected a dict"
            )
        return found

    def _common(self) -> object:
        if COMMON_STATE in self.objects:
            place = self._places[MetadataIndex(COMMON_STATE)]
            with (self.folder / place.relative_path).open("rb") as stream:
                stream.seek(place.offset)
                found = _unpickle(io.BytesIO(stream.read(place.length)), self.folder)
                return found[0] if isinstance(found, list) and len(found) == 1 else found
        legacy = self.folder / "common.pt"  # megatron-core before 0.19
        if not legacy.is_file():
            raise CheckpointError(f"{self.folder} has neither {COMMON_STATE} nor common.pt, so no arguments")
        return _unpickle(io.BytesIO(legacy.read_bytes()), self.folder)


def _unpickle(stream: io.BytesIO, folder: Path) -> object:
    """Load a torch.save stream; objects of Megatron's own classes come as `plain_pickle.Opaque`."""
    try:
        if "constants.pkl" in torch_checkpoint.archive_members(stream):
            raise ValueError("it holds a TorchScript program, which torch.load would run")
        stream.seek(0)
        return torch.load(stream, pickle_module=plain_pickle, weights_only=False, map_location="cpu")
    except Exception as error:  # damaged bytes can raise nearly anything
        raise CheckpointError(
            f"{folder}: the arguments cannot be read ({type(error).__name__}: {error})"
        ) from error
