"""The layout of an HF checkpoint (tensor -> file, type, shape): checked on import, planned on export."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megatron_dms.conversion.families import Model
from megatron_dms.conversion.families.config_keys import DTYPES
from megatron_dms.conversion.hf_folder import (
    INDEX,
    SINGLE,
    HFFolder,
    copy_file,
    is_plain_name,
    read_json,
    side_files,
)
from megatron_dms.conversion.megatron_tensors import MegatronTensors
from megatron_dms.conversion.model_card import model_name
from megatron_dms.conversion.rope import inverse_frequencies
from megatron_dms.conversion.transforms import Row
from megatron_dms.errors import CheckpointError, some
from megatron_dms.formats.megatron_folder import BUFFERS, SOURCE
from megatron_dms.formats.safetensors_file import TensorInfo, write_file
from megatron_dms.formats.tensor_rows import Span, same_bits

_SHARD_BYTES = 5 * 10**9
"""Size at which a new file begins, where no layout is known; transformers' own habit."""
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PREFIXES = {
    "_orig_mod.": "which torch.compile adds",
    "module.": "which data parallel wrappers add",
    "base_model.model.": "which PEFT adds (merge the adapter first)",
    "base_model.": "which a wrapper adds",
    "language_model.": "of the text part of a vision model",
    "model.language_model.": "of the text part of a vision model",
    "student_model.": "of the student in a training checkpoint",
}
"""Prefixes of tensors that tools leave -> where they come from."""
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""RoPE's frequencies, which older transformers saved with each layer (Llama 2 has them); none reads them."""


@dataclass
class Layout:
    """Which tensors an HF checkpoint has.

    infos: HF name -> file, type, shape. copies: name -> the tensor that it repeats (a tied output layer that
    was written out). buffers: names of tensors that are no part of the model and are kept aside.
    """

    infos: dict[str, TensorInfo]
    copies: dict[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the content of the file `SOURCE`, without shapes, which follow from config.json."""
        tensors = {
            name: [info.file, str(info.dtype).removeprefix("torch.")] for name, info in self.infos.items()
        }
        return {"version": 1, "tensors": tensors, "copies": self.copies}

    def files(self) -> dict[str, dict[str, TensorInfo]]:
        """Return the tensors of each file."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.infos.items():
            found.setdefault(info.file, {})[name] = info
        return found

    def write_index(self, out: Path, side_folder: Path) -> None:
        """Write the index of a checkpoint in several files: the index of the source if it still holds."""
        if list(self.files()) == [SINGLE]:
            return
        weight_map = {name: info.file for name, info in sorted(self.infos.items())}
        old = side_folder / INDEX
        if old.is_file() and read_json(old).get("weight_map") == weight_map:
            copy_file(old, out / INDEX)
            return
        total = sum(info.nbytes for info in self.infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def of_source(source: HFFolder, model: Model, rows: Sequence[Row]) -> Layout:
    """Return the layout of an HF folder, whose tensors must be those of the name table, with its shapes.

    Two kinds of tensors may be there in addition: the output layer of a tied model, if it equals the
    embedding, and buffers that agree with config.json. Raises CheckpointError, naming what is missing, not
    expected or misshapen.
    """
    if model.layers > len(source.infos):
        raise CheckpointError(
            f"{source.path}: {len(source.infos)} tensors, but num_hidden_layers is {model.layers}"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        for layer in row.layers(model.layers):
            shapes.update(zip(row.hf_names(layer), row.shapes, strict=True))
    missing, extra = sorted(set(shapes) - set(source.infos)), sorted(set(source.infos) - set(shapes))
    if missing == [_OUTPUT]:
        raise CheckpointError(
            f"{source.path}: {_OUTPUT} is missing, but tie_word_embeddings is false; "
            "set it to true in config.json if the model shares its embedding"
        )
    copies: dict[str, str] = {}
    if model.tied and _OUTPUT in extra and _EMBEDDING not in missing:
        if not _same_tensor(source, _OUTPUT, _EMBEDDING):
            raise CheckpointError(
                f"{source.path}: {_OUTPUT} differs from {_EMBEDDING}, but tie_word_embeddings is true; "
                "set it to false in config.json if the output layer is its own"
            )
        extra.remove(_OUTPUT)
        copies[_OUTPUT] = _EMBEDDING
    buffers = tuple(name for name in extra if _BUFFER.fullmatch(name))
    for name in buffers:
        _check_frequencies(source, name, model)
    extra = [name for name in extra if name not in buffers]
    if missing or extra:
        for prefix, cause in _PREFIXES.items():
            if missing and extra and all(name in extra for name in (prefix + m for m in missing)):
                raise CheckpointError(
                    f"{source.path}: each tensor's name begins with {prefix!r}, {cause}; save the "
                    "model again without it"
                )
        if missing and all(m.startswith("model.") and m[6:] in source.infos for m in missing):
            raise CheckpointError(
                f"{source.path}: the tensors' names lack 'model.': the inner model was saved without its "
                "output layer; save the model for causal language modelling"
            )
        silent = model.dms is None and any(".dms_" in name for name in extra)
        raise CheckpointError(
            f"{source.path}: tensors missing {some(missing)}, not expected {some(extra)} "
            f"for this {model.family.model_type} config.json"
            + (", which says nothing of DMS" if silent else "")
        )
    for name, shape in shapes.items():
        if source.infos[name].shape != shape:
            raise CheckpointError(
                f"{source.path / source.infos[name].file}: {name} has shape {source.infos[name].shape}, "
                f"expected {shape} from config.json"
            )
    return Layout(dict(source.infos), copies, buffers)


def _same_tensor(source: HFFolder, name: str, other: str) -> bool:
    """Compare two tensors bit for bit, in pieces."""
    a, b = source.rows(name), source.rows(other)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pieces = zip(*(Span(name, rows, 0, rows.shape[0]).pieces() for rows in (a, b)), strict=True)
    return all(same_bits(one, two) for one, two in pieces)


def _check_frequencies(source: HFFolder, name: str, model: Model) -> None:
    expected = inverse_frequencies(
        {"rope_type": "default", "rope_theta": model.rope["rope_theta"]}, model.head_size
    )
    found = source.read(name).float()
    # to the precision of the half types that whole models were cast to
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-6):
        raise CheckpointError(
            f"{source.path}: {name} holds other frequencies than rope_theta {model.rope['rope_theta']} of "
            "config.json gives; correct the one that is wrong"
        )


def write_side_files(
    source: HFFolder, layout: Layout, folder: Path, accepted_keys: Collection[str] = ()
) -> None:
    """Write what an export will need in addition to the weights to reproduce the folder `source`: side files,
    layout and buffers. accepted_keys: unknown keys of config.json that the user let through.
    """
    for name in side_files(source.path):
        copy_file(source.path / name, folder / name)
    content = {"name": model_name(source.path), **layout.to_json()}
    if accepted_keys:
        content["accepted_config_keys"] = sorted(set(accepted_keys))
    (folder / SOURCE).write_text(json.dumps(content, indent=1) + "\n")
    if layout.buffers:
        infos = {name: layout.infos[name] for name in layout.buffers}
        write_file(folder / BUFFERS, infos, ((name, [source.read(name)]) for name in infos))


def for_export(tensors: MegatronTensors) -> Layout:
    """Return the layout of an export: the layout on import where it is known, order included, so that an
    untouched file comes back byte for byte.

    The layout is known from `SOURCE`, or from the side folder's own weights if that is a complete HF folder.
    New tensors (the predictor's) go to the end of the last file. Without a known layout, tensors go by layer
    into files of 5 GB.
    """
    known, copies = _known_layout(tensors)
    for name, original in copies.items():
        if original not in tensors.places:
            raise CheckpointError(f"{tensors.side_folder / SOURCE} repeats {original}, which is not there")
        tensors.places[name] = tensors.places[original]
    default = getattr(torch, tensors.model.dtype) if tensors.model.dtype else None
    stale = [name for name in known if not tensors.holds(name)]
    if stale:
        raise CheckpointError(
            f"{tensors.side_folder / SOURCE} names {some(stale)}, which the checkpoint lacks"
        )
    new = sorted(
        (name for name in tensors.places if name not in known), key=lambda name: tensors.places[name][1]
    )
    infos: dict[str, TensorInfo] = {}
    for name in [*known, *new]:
        file, dtype = known.get(name, (None, None))
        dtype = dtype or default or tensors.stored_dtype(name)
        infos[name] = TensorInfo(file or "", dtype, tensors.shape(name))
    last = max((file for file, _ in known.values()), default=None)
    files = _split(infos) if last is None else {name: info.file or last for name, info in infos.items()}
    return Layout({name: replace(info, file=files[name]) for name, info in infos.items()}, copies)


Known = tuple[dict[str, tuple[str, torch.dtype]], dict[str, str]]
"""HF name -> its file and type, and the copies."""


def _known_layout(tensors: MegatronTensors) -> Known:
    folder = tensors.side_folder
    if (folder / SOURCE).is_file():
        return _read_source(folder / SOURCE)
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return {}, {}
    source = HFFolder(folder)
    layout = of_source(source, tensors.model, tensors.model.rows())
    tensors.buffers.update({name: source.rows(name) for name in layout.buffers})
    return {name: (info.file, info.dtype) for name, info in layout.infos.items()}, layout.copies


def _read_source(path: Path) -> Known:
    found = read_json(path)
    if found.get("version") != 1:
        raise CheckpointError(
            f"{path} has version {found.get('version')!r}, expected 1; import the checkpoint again"
        )
    try:
        listed, repeated = found["tensors"], found["copies"]
        if not isinstance(listed, dict) or not isinstance(repeated, dict):
            raise TypeError("expected two objects")
        tensors = {name: (file, getattr(torch, dtype)) for name, (file, dtype) in listed.items()}
        copies = {str(name): str(original) for name, original in repeated.items()}
        sound = all(
            dtype in DTYPES and is_plain_name(file) and file.endswith(".safetensors")
            for file, dtype in listed.values()
        ) and all(name in tensors for name in copies)
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} is damaged; import the checkpoint again")
    return tensors, copies


def _split(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Assign tensors to files: name -> file, with a new file whenever one is full."""
    numbers, number, filled = {}, 0, 0
    for name, info in infos.items():
        if filled and filled + info.nbytes > _SHARD_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += info.nbytes
    if number == 0:
        return dict.fromkeys(infos, SINGLE)
    return {name: f"model-{n + 1:05d}-of-{number + 1:05d}.safetensors" for name, n in numbers.items()}
