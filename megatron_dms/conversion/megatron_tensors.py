"""The tensors of a Megatron checkpoint under their HF names."""

import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.conversion.families import Model, read_model
from megatron_dms.conversion.hf_folder import accepted_config_keys, read_dms_metadata, read_json
from megatron_dms.conversion.megatron_arguments import check_arguments
from megatron_dms.conversion.transforms import Row, Vocabulary, part_of
from megatron_dms.errors import CheckpointError, some
from megatron_dms.formats.megatron_folder import BUFFERS, HF, SOURCE, open_checkpoint
from megatron_dms.formats.safetensors_file import read_header
from megatron_dms.formats.tensor_rows import FileRows, Shape, Span
from megatron_dms.formats.torch_dist import Reader

_MOST_STEPS = 2**40
_NOT_THE_MODEL = re.compile(r"(optimizer|chained_\d+|rng_state|rerun_state)\b|.*\._extra_state\b")
"""Keys of tensors in a training checkpoint that belong to the run, not to the model."""
_OF_ONE_LAYER = re.compile(r"decoder\.layers\.\d+\.")
"""Keys of a checkpoint whose layers differ (heterogeneous) or were saved as such."""


def _dms_fields(reader: Reader, args: Namespace) -> dict[str, object] | None:
    fields = getattr(args, "dms", None)
    if fields is not None and not (isinstance(fields, dict) and "predictor" in fields):
        raise CheckpointError(f"{reader.folder}: args.dms is {fields!r}, expected DMS settings")
    return fields


def _reached_cr(reader: Reader, args: Namespace) -> float | None:
    """Return the compression ratio that training asked for when it saved; None for a base model.

    An imported DMS model brings its own number (`args.dms_reached_cr`).
    """
    fields = _dms_fields(reader, args)
    if not fields or "steps_per_cr" not in fields:  # imported, not trained here
        return getattr(args, "dms_reached_cr", None)
    try:
        config = DMSConfig.from_dict(fields)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # RuntimeError: of a tensor
        raise CheckpointError(f"{reader.folder}: args.dms is damaged: {error}") from error
    iteration = reader.common().get("iteration")
    if not isinstance(iteration, int) or not 0 <= iteration < _MOST_STEPS:
        raise CheckpointError(
            f"{reader.folder} has iteration {str(iteration)[:80]}, expected the step it was saved at"
        )
    steps = iteration - config.zeroing_steps
    if config.zeroing_steps and steps <= 0:
        raise CheckpointError(
            f"{reader.folder} was saved within its zeroing phase of {config.zeroing_steps} steps: the "
            "borrowed channel still takes part in attention; use a later one"
        )
    return config.schedule.target_cr(steps)


def _head_size(args: Namespace) -> int | None:
    """Return the head size that the checkpoint's arguments say, which a config.json may leave open."""
    found = getattr(args, "kv_channels", None)
    return found if type(found) is int and found > 0 else None


def _buffers(path: Path) -> dict[str, FileRows]:
    infos = read_header(path) if path.is_file() else {}
    return {name: FileRows(path, info.offset, info.dtype, info.shape) for name, info in infos.items()}


@dataclass
class MegatronTensors:
    """The tensors of one iteration, whose keys and shapes agree with the name table of its config.json.

    places: HF name -> (row, layer, part). side_folder: where config.json and the tokenizer are. buffers: HF
    tensors that are no part of the model.
    """

    reader: Reader
    args: Namespace
    model: Model
    rows: list[Row]
    side_folder: Path
    config: dict[str, object]
    dms_metadata: dict[str, object] | None
    dms_fields: Mapping[str, object] | None
    reached_cr: float | None
    buffers: dict[str, FileRows]
    places: dict[str, tuple[Row, int, int]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        megatron_dir: Path,
        iteration: int | None,
        hf_source: str | Path | None,
        accepted_keys: Collection[str] = (),
        accepted_arguments: Collection[str] = (),
    ) -> "MegatronTensors":
        """Open one iteration. Raises CheckpointError for missing, extra or misshapen tensors, and for another
        model than the one of config.json.

        accepted_keys, accepted_arguments: unknown keys of config.json, beside those that the import let
        through, and unknown arguments that do not change the model.
        """
        reader, args = open_checkpoint(megatron_dir, iteration)
        side_folder = Path(hf_source) if hf_source is not None else megatron_dir / HF
        if not (side_folder / "config.json").is_file():
            raise CheckpointError(
                f"{side_folder / 'config.json'} is missing; name the model's folder by --hf-source"
            )
        config = read_json(side_folder / "config.json")
        metadata = read_dms_metadata(side_folder)
        source = megatron_dir / HF / SOURCE
        recorded = accepted_config_keys(source) if source.is_file() else []
        model = read_model(config, metadata, {*accepted_keys, *recorded}, _head_size(args))
        check_arguments(args, model, str(reader.folder), str(side_folder / "config.json"), accepted_arguments)
        fields = _dms_fields(reader, args)
        rows = model.family.rows(model, str(fields["predictor"]) if fields else None)
        reached_cr = _reached_cr(reader, args)
        buffers = _buffers(megatron_dir / HF / BUFFERS)
        found = cls(reader, args, model, rows, side_folder, config, metadata, fields, reached_cr, buffers)
        found._check()
        return found

    def _check(self) -> None:
        stored = {
            key: tuple(md.size) for key, md in self.reader.tensors.items() if not _NOT_THE_MODEL.match(key)
        }
        expected = {row.megatron: row for row in self.rows}
        missing, extra = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
        if missing or extra:
            per_layer = any(_OF_ONE_LAYER.match(key) for key in extra)
            raise CheckpointError(
                f"{self.reader.folder}: tensors missing {some(missing)}, not expected {some(extra)} for this "
                "config.json"
                + (
                    "; its layers have keys of their own: save it with one key for all layers"
                    if per_layer
                    else ""
                )
            )
        for key, row in expected.items():
            lead = (self.model.layers,) if row.per_layer else ()
            shape, wanted = stored[key], lead + row.megatron_shape
            if isinstance(row, Vocabulary):  # may be padded
                row.check_rows(shape[0])
                shape, wanted = shape[1:], wanted[1:]
            if shape != wanted:
                raise CheckpointError(
                    f"{self.reader.folder}: {key} has shape {stored[key]}, expected {wanted}"
                )
            for layer in row.layers(self.model.layers):
                for part, name in enumerate(row.hf_names(layer)):
                    self.places[name] = (row, layer, part)

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has an HF tensor, in the model or kept beside it."""
        return name in self.places or name in self.buffers

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the type under which the checkpoint holds an HF tensor."""
        if name in self.buffers:
            return self.buffers[name].dtype
        return self.reader.tensors[self.places[name][0].megatron].properties.dtype

    def shape(self, name: str) -> Shape:
        """Return the shape of an HF tensor."""
        if name in self.buffers:
            return self.buffers[name].shape
        row, _, part = self.places[name]
        return row.shapes[part]

    def spans(self, name: str) -> list[Span]:
        """Return one HF tensor in the stored type, to be read row by row."""
        if name in self.buffers:
            return [Span(name, self.buffers[name], 0, self.buffers[name].shape[0])]
        row, layer, part = self.places[name]
        stored = self.reader.rows(row.megatron, layer if row.per_layer else None)
        return part_of(row, part, name, stored)

    def read(self, name: str) -> Tensor:
        """Read one HF tensor in the stored type."""
        pieces = [piece.clone() for span in self.spans(name) for piece in span.pieces()]
        return torch.cat(pieces)
