"""Megatron's torch_dist format, read and written without Megatron, without process groups, one tensor at a
time.

It is PyTorch's distributed checkpoint (torch.distributed.checkpoint, DCP): `.metadata` (a pickle of names,
shapes and places), `*.distcp` (the tensors), and Megatron's `metadata.json`. Checked on megatron-core
0.19.2:
- layers of a model share a key and have a leading layer axis; each layer is a chunk [1, ...] of it;
- everything that is no tensor sits in one object under the key `common_state/shard_0_1`, saved by
  `torch.save([...])`;
- each parallel linear layer (and each norm of Transformer Engine) asks on loading for an object
  `<module>._extra_state/shard_<layer>_<layers>`, whose content is None without FP8.
DCP's own planner interfaces are used, which are public: they let a tensor be made when its turn to be
written comes.
"""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dms.checkpoint import plain_pickle
from megatron_dms.checkpoint.errors import CheckpointError

COMMON_STATE = "common_state/shard_0_1"
_METADATA_JSON = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True)
class Chunk:
    """One tensor to write: all of `key`, or layer `layer` of `layers` of it. `make` is called when its turn
    comes.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    layer: int | None = None
    layers: int | None = None

    def write_item(self) -> WriteItem:
        """DCP's description, with the layer axis in front where there is one."""
        lead, axis = ((), ()) if self.layer is None else ((self.layer,), (self.layers,))
        offsets = torch.Size([*lead, *(0 for _ in self.shape)])
        sizes = torch.Size([*(1 for _ in lead), *self.shape])
        return WriteItem(
            index=MetadataIndex(self.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(offsets, sizes),
                TensorProperties(self.dtype),
                torch.Size([*axis, *self.shape]),
            ),
        )


class _Writer(FileSystemWriter):
    """DCP's writer, less the output's path and a random id in its metadata: the same input gives the same
    bytes.
    """

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Planner(DefaultSavePlanner):
    """Hands the writer each item when it asks for it."""

    def __init__(self, chunks: dict[MetadataIndex, Chunk], objects: dict[MetadataIndex, bytes]) -> None:
        super().__init__()
        self.chunks = chunks
        self.objects = objects

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self.objects[write_item.index])
        chunk = self.chunks[write_item.index]
        tensor = chunk.make()
        if tuple(tensor.shape) != chunk.shape or tensor.dtype != chunk.dtype:
            raise RuntimeError(
                f"{chunk.key}: made {tensor.dtype} {tuple(tensor.shape)}, announced {chunk.shape}"
            )
        return tensor.reshape(write_item.tensor_data.chunk.sizes).contiguous()


def write(folder: Path, chunks: Iterable[Chunk], objects: Iterable[str], common: dict[str, object]) -> None:
    """Write one checkpoint folder (release or iter_...), which must exist.

    objects: keys of further objects whose content is None. common: what is no tensor, `args` among it.
    Memory: one layer, for DCP's writer holds the latest tensor of each key.
    """
    by_index = {(item := chunk.write_item()).index: (chunk, item) for chunk in chunks}
    blobs = {MetadataIndex(key): _serialized([None]) for key in objects}
    blobs[MetadataIndex(COMMON_STATE)] = _serialized([common])
    items = [WriteItem(index, WriteItemType.BYTE_IO) for index in blobs] + [
        item for _, item in by_index.values()
    ]
    # per_thread_copy_ahead=0 keeps the writer off the GPU's streams and reads the tensors in the order given
    writer = _Writer(folder, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = create_default_global_save_plan([writer.prepare_local_plan(SavePlan(items))])
    (plan,) = writer.prepare_global_plan(plans)
    planner = _Planner({index: chunk for index, (chunk, _) in by_index.items()}, blobs)
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    (folder / "metadata.json").write_text(json.dumps(_METADATA_JSON))


def _serialized(content: list[object]) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


class _Target(DefaultLoadPlanner):
    """Receives what DCP reads: into one tensor, or as bytes."""

    def __init__(self, tensor: Tensor | None) -> None:
        super().__init__()
        self.tensor = tensor
        self.bytes: io.BytesIO | None = None

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.tensor
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: `resolve_tensor` gave a view."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.bytes = value


class Reader:
    """One checkpoint folder (release or iter_...), as training or `write` left it, at whatever TP x PP x DP.

    tensors: key -> global shape and dtype, the layer axis included. objects: keys of everything else.
    Raises CheckpointError if the folder is half-written: no metadata, or a file missing or shorter than it
    must be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("metadata.json", ".metadata"):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name} is missing: the checkpoint is half-written or not in torch_dist format"
                )
        self._reader = FileSystemReader(folder)
        try:
            backend = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise CheckpointError(
                f"{folder}: metadata is damaged ({type(error).__name__}: {error})"
            ) from error
        if backend != "torch_dist":
            raise CheckpointError(
                f"{folder} has format {backend!r}, expected 'torch_dist' (--ckpt-format torch_dist)"
            )
        everything = metadata.state_dict_metadata
        self.tensors = {key: md for key, md in everything.items() if isinstance(md, TensorStorageMetadata)}
        self.objects = sorted(set(everything) - set(self.tensors))
        self._check_files()

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for place in self._reader.storage_data.values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        for name, size in sorted(needed.items()):
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing: the checkpoint is half-written or was copied in part"
                )
            if path.stat().st_size < size:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected {size}: truncated")

    def tensor(self, key: str, layer: int | None = None) -> Tensor:
        """The whole of `key`, or one layer of it without the layer axis."""
        stored = self.tensors[key]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        # every value is covered, as checked below
        target = _Target(torch.empty(sizes, dtype=stored.properties.dtype, device="cpu"))
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        covered = sum(item.lengths.numel() for item in items)
        if covered != chunk.sizes.numel():
            raise CheckpointError(
                f"{self.folder}: {key} has {covered} of {chunk.sizes.numel()} values; half-written?"
            )
        self._read(items, target, key)
        return target.tensor if layer is None else target.tensor[0]

    def common(self) -> dict[str, object]:
        """What is no tensor: `args`, `iteration` and so on."""
        if COMMON_STATE in self.objects:
            index, target = MetadataIndex(COMMON_STATE), _Target(None)
            zero = torch.Size([0])
            self._read([ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero)], target, COMMON_STATE)
            return _unpickle(target.bytes, self.folder)[0]
        legacy = self.folder / "common.pt"  # megatron-core before 0.19
        if not legacy.is_file():
            raise CheckpointError(f"{self.folder} has neither {COMMON_STATE} nor common.pt, so no arguments")
        return _unpickle(io.BytesIO(legacy.read_bytes()), self.folder)

    def _read(self, items: list[ReadItem], target: _Target, key: str) -> None:
        try:
            self._reader.read_data(LoadPlan(items), target).wait()
        except Exception as error:  # torch.load of damaged bytes can raise nearly anything
            raise CheckpointError(
                f"{self.folder}: cannot read {key} ({type(error).__name__}: {error})"
            ) from error


def _unpickle(stream: io.BytesIO, folder: Path) -> object:
    """Load a torch.save stream; objects of Megatron's own classes come as `plain_pickle.Opaque`."""
    try:
        return torch.load(stream, pickle_module=plain_pickle, weights_only=False, map_location="cpu")
    except Exception as error:  # damaged bytes can raise nearly anything
        raise CheckpointError(
            f"{folder}: the arguments cannot be read ({type(error).__name__}: {error})"
        ) from error
