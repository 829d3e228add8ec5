"""Which HF tensors a checkpoint has, of which type, in which file: checked on import, planned on export."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megatron_dms.checkpoint.errors import CheckpointError
from megatron_dms.checkpoint.families import Model
from megatron_dms.checkpoint.hf_folder import INDEX, HFFolder, copy_file, read_json
from megatron_dms.checkpoint.megatron_folder import SOURCE
from megatron_dms.checkpoint.safetensors_file import TensorInfo
from megatron_dms.checkpoint.source import MegatronTensors
from megatron_dms.checkpoint.transforms import Row

_SHARD_BYTES = 5 * 10**9
"""Size at which a new file begins, where no layout is known; transformers' own habit."""
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass
class Layout:
    """infos: HF name -> file, type, shape. copies: name -> the tensor it repeats (a tied output layer
    written out).
    """

    infos: dict[str, TensorInfo]
    copies: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """For `SOURCE`; shapes follow from config.json."""
        tensors = {
            name: [info.file, str(info.dtype).removeprefix("torch.")] for name, info in self.infos.items()
        }
        return {"version": 1, "tensors": tensors, "copies": self.copies}

    def files(self) -> dict[str, dict[str, TensorInfo]]:
        """File -> its tensors."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.infos.items():
            found.setdefault(info.file, {})[name] = info
        return found

    def write_index(self, out: Path, side_folder: Path) -> None:
        """The index of a checkpoint in several files: the source's own bytes while it still says the same."""
        if len(self.files()) == 1:
            return
        weight_map = {name: info.file for name, info in sorted(self.infos.items())}
        old = side_folder / INDEX
        if old.is_file() and read_json(old).get("weight_map") == weight_map:
            copy_file(old, out / INDEX)
            return
        total = sum(info.nbytes for info in self.infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_names(source: HFFolder, model: Model, rows: Sequence[Row]) -> dict[str, str]:
    """Every tensor of an HF folder must be in the name table with its shape, and the other way round.

    Returns the copies: a tied model may have its output layer written out too, if it equals the embedding.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        for layer in range(model.layers if row.per_layer else 1):
            shapes.update(zip(row.hf_names(layer), row.shapes, strict=True))
    missing, extra = sorted(set(shapes) - set(source.infos)), sorted(set(source.infos) - set(shapes))
    if missing == [_OUTPUT]:
        raise CheckpointError(
            f"{source.path}: {_OUTPUT} is missing, but tie_word_embeddings is false; "
            "set it to true in config.json if the model shares its embedding"
        )
    copies: dict[str, str] = {}
    if model.tied and _OUTPUT in extra and _EMBEDDING not in missing:
        if not torch.equal(source.read(_OUTPUT), source.read(_EMBEDDING)):
            raise CheckpointError(
                f"{source.path}: {_OUTPUT} differs from {_EMBEDDING}, but tie_word_embeddings is true; "
                "set it to false in config.json if the output layer is its own"
            )
        extra.remove(_OUTPUT)
        copies[_OUTPUT] = _EMBEDDING
    if missing or extra:
        silent = model.dms is None and any(".dms_" in name for name in extra)
        raise CheckpointError(
            f"{source.path}: tensors missing {_some(missing)}, not expected {_some(extra)} "
            f"for this {model.family.model_type} config.json"
            + (", which says nothing of DMS" if silent else "")
        )
    for name, shape in shapes.items():
        if source.infos[name].shape != shape:
            raise CheckpointError(
                f"{source.path / source.infos[name].file}: {name} has shape {source.infos[name].shape}, "
                f"expected {shape} from config.json"
            )
    return copies


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown or "none"


def from_source(source: HFFolder, copies: Mapping[str, str]) -> Layout:
    """The layout of an HF folder as it is."""
    return Layout(dict(source.infos), dict(copies))


def for_export(tensors: MegatronTensors) -> Layout:
    """The layout on import where it is known, order included, so that an untouched file comes back byte for
    byte.

    New tensors (the predictor's) go to the end of the last file. Without a known layout: files of 5 GB, by
    layer.
    """
    known, copies = _read_source(tensors.side_folder / SOURCE)
    for name, original in copies.items():
        tensors.places[name] = tensors.places[original]
    default = getattr(torch, tensors.model.dtype) if tensors.model.dtype else None
    stale = sorted(set(known) - set(tensors.places))
    if stale:
        raise CheckpointError(
            f"{tensors.side_folder / SOURCE} names {_some(stale)}, which the checkpoint lacks"
        )
    new = sorted(
        (name for name in tensors.places if name not in known), key=lambda name: tensors.places[name][1]
    )
    infos: dict[str, TensorInfo] = {}
    for name in [*known, *new]:
        row, _, part = tensors.places[name]
        file, dtype = known.get(name, (None, None))
        infos[name] = TensorInfo(file or "", dtype or default or tensors.stored_dtype(name), row.shapes[part])
    last = max((file for file, _ in known.values()), default=None)
    files = _split(infos) if last is None else {name: info.file or last for name, info in infos.items()}
    return Layout({name: replace(info, file=files[name]) for name, info in infos.items()}, copies)


def _read_source(path: Path) -> tuple[dict[str, tuple[str, torch.dtype]], dict[str, str]]:
    if not path.is_file():
        return {}, {}
    found = read_json(path)
    if found.get("version") != 1:
        raise CheckpointError(
            f"{path} has version {found.get('version')!r}, expected 1; import the checkpoint again"
        )
    tensors = {name: (file, getattr(torch, dtype)) for name, (file, dtype) in found["tensors"].items()}
    return tensors, found["copies"]


def _split(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Name -> file, a new file whenever one is full."""
    numbers, number, filled = {}, 0, 0
    for name, info in infos.items():
        if filled and filled + info.nbytes > _SHARD_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += info.nbytes
    if number == 0:
        return dict.fromkeys(infos, "model.safetensors")
    return {name: f"model-{n + 1:05d}-of-{number + 1:05d}.safetensors" for name, n in numbers.items()}
