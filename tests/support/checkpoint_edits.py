"""Reading and changing checkpoints on disk: files, tensors, metadata, further iterations."""

import io
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_dms.conversion import checkpoint_args
from megatron_dms.conversion.transforms import Row
from megatron_dms.formats.megatron_folder import iteration_folder
from megatron_dms.formats.torch_dist import COMMON_STATE, Chunk, Reader, write

DMS = {
    "predictor": "linear",
    "granularity": "head",
    "alpha_scale": 100.0,
    "alpha_offset": 5.0,
    "window": 16,
    "lag": 1,
    "temperature": 0.1,
}


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all safetensors files of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def join(row: Row, parts: list[torch.Tensor]) -> torch.Tensor:
    """Put a row's HF tensors together to its Megatron tensor, from the definition of a row."""
    return torch.cat([parts[part][start:stop] for part, start, stop in row.segments()])


def rewrite(megatron: Path, change: dict[str, torch.Tensor], args: dict, iteration: int) -> None:
    """Write a further iteration as training would save it, with some tensors and arguments changed."""
    reader = Reader(iteration_folder(megatron))
    tensors = {**{key: reader.tensor(key) for key in reader.tensors}, **change}
    chunks = [Chunk(key, tuple(t.shape), t.dtype, lambda t=t: [t]) for key, t in tensors.items()]
    stored = Namespace(**{**vars(checkpoint_args(megatron)), **args})
    folder = megatron / f"iter_{iteration:07d}"
    folder.mkdir()
    objects = [key for key in reader.objects if key != COMMON_STATE]
    write(folder, chunks, objects, {"args": stored, "iteration": iteration})
    (megatron / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def edit_metadata(folder: Path, change: Callable[[object], object]) -> None:
    """Change the `.metadata` of a release or iter_... folder."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def store_again(folder: Path, key: str, content: object) -> None:
    """Put what torch.save makes of a tensor, or of an object, in the place of the only one under `key`."""
    stream = io.BytesIO()
    torch.save(content, stream)
    with (folder / "__0_0.distcp").open("ab") as file:
        offset = file.tell()
        file.write(stream.getvalue())

    def change(metadata: object) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == key:
                place.offset, place.length = offset, len(stream.getvalue())

    edit_metadata(folder, change)
