"""The files of an export that are not weights: config.json, dms_metadata.json, model card and code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dms import hf
from megatron_dms.conversion import dms_formats
from megatron_dms.conversion.hf_folder import copy_file, read_json
from megatron_dms.conversion.megatron_tensors import MegatronTensors
from megatron_dms.conversion.model_card import BASE_CARD, CARD, model_card, model_name
from megatron_dms.errors import CheckpointError
from megatron_dms.formats.megatron_folder import SOURCE

CONFIG = "config.json"


@dataclass(frozen=True)
class Settings:
    """The plan of these files, made before anything is written, so that a format that cannot hold the model
    is refused in time.

    source: folder of the side files. content: file name -> what it will hold; None: the source's bytes.
    renamed: side files that get another name.
    """

    source: Path
    content: dict[str, Mapping[str, object] | str | None]
    code: tuple[Path, ...]
    replaced: frozenset[str]
    """Names of side files that are not to be copied."""
    renamed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def plan(cls, tensors: MegatronTensors, dms_format: str | None) -> "Settings":
        """Plan the files of an export.

        dms_format: one of FORMATS (conversion_options.py). None means the format of the import, or
        megatron_dms for a model that was retrofitted since.

        Raises CheckpointError if the format cannot say what the model does, or there is no DMS model.
        """
        source = dms_formats.read(tensors.config, tensors.dms_metadata)
        default = source.format if source is not None else "megatron_dms"
        target = dms_formats.stored(tensors.dms_fields, tensors.reached_cr, dms_format or default)
        if target is None:
            cls._refuse_dense(tensors, source, dms_format)
            return cls(tensors.side_folder, {CONFIG: None}, (), frozenset({CONFIG}))
        config = dms_formats.write_config(tensors.config, source, target, tensors.model.family)
        if config is not tensors.config:
            config = {**config, **tensors.model.corrections(config)}
        metadata = dms_formats.write_metadata(tensors.dms_metadata, target, tensors.model.positions)
        content: dict[str, Mapping[str, object] | str | None] = {}
        if metadata is not None:
            content[dms_formats.METADATA] = metadata
        ours = tuple(Path(file) for file in hf.export_files())
        runs_ours = hf.MODELING_MODULE in str(config.get("auto_map"))
        brought_ours = source is not None and source.format == "megatron_dms"
        stale = () if target == source else (dms_formats.METADATA,)
        renamed = {}
        if target != source:
            content[CARD] = _card(tensors, target, brought_ours)
            renamed = {} if brought_ours else {CARD: BASE_CARD}
        content[CONFIG] = config  # last: without it nobody takes a folder for a model
        before = {CONFIG: tensors.config, dms_formats.METADATA: tensors.dms_metadata}
        return cls(
            tensors.side_folder,
            {name: None if value is before.get(name) else value for name, value in content.items()},
            ours if runs_ours else (),
            frozenset({*content, *stale, *(file.name for file in ours if brought_ours)}),
            renamed,
        )

    @staticmethod
    def _refuse_dense(
        tensors: MegatronTensors, source: dms_formats.DMS | None, dms_format: str | None
    ) -> None:
        if source is not None:
            raise CheckpointError(
                f"{tensors.side_folder} is a DMS model's, but {tensors.reader.folder} has no args.dms; name "
                "the base model's folder by --hf-source"
            )
        if dms_format is not None:
            raise CheckpointError(
                f"{tensors.reader.folder} holds no DMS model, so it has no DMS format; drop --dms-format"
            )

    def write(self, out: Path) -> None:
        """Write the files into an export, config.json as the last of them."""
        for file in self.code:
            copy_file(file, out / file.name)
        for name, new_name in self.renamed.items():
            if (self.source / name).is_file():
                copy_file(self.source / name, out / new_name)
        for name, value in self.content.items():
            if value is None:
                copy_file(self.source / name, out / name)
            else:
                text = value if isinstance(value, str) else json.dumps(value, indent=2) + "\n"
                (out / name).write_text(text, encoding="utf-8")


def _card(tensors: MegatronTensors, target: dms_formats.DMS, brought_ours: bool) -> str:
    """Return the model card, which names the imported folder as the origin of the weights."""
    path = tensors.side_folder / SOURCE
    name = read_json(path).get("name") if path.is_file() else model_name(tensors.side_folder)
    own_card = tensors.side_folder / (BASE_CARD if brought_ours else CARD)
    iteration = tensors.reader.common().get("iteration", 0)
    if not isinstance(iteration, int):
        raise CheckpointError(f"{tensors.reader.folder} has iteration {iteration!r}, expected a number")
    return model_card(target, tensors.args, iteration, str(name or "the base model"), own_card)
