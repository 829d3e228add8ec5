"""What an export says beside the weights: config.json, dms_metadata.json, the code that runs a DMS model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_dms import hf
from megatron_dms.checkpoint import dms
from megatron_dms.checkpoint.errors import CheckpointError
from megatron_dms.checkpoint.hf_folder import copy_file
from megatron_dms.checkpoint.source import MegatronTensors

CONFIG = "config.json"


@dataclass(frozen=True)
class Settings:
    """Planned before anything is written, so that a format that cannot hold the model is refused in time.

    source: folder of the side files. content: file name -> what it will hold; None: the source's bytes.
    """

    source: Path
    content: dict[str, Mapping[str, object] | None]
    code: tuple[Path, ...]
    replaced: frozenset[str]
    """Names of side files that are not to be copied."""

    @classmethod
    def plan(cls, tensors: MegatronTensors, dms_format: str | None) -> "Settings":
        """dms_format: one of dms.FORMATS; None means that of the import, or megatron_dms for a model that
        was retrofitted since.

        Raises CheckpointError if the format cannot say what the model does, or there is no DMS model.
        """
        source = dms.read(tensors.config, tensors.dms_metadata)
        default = source.format if source is not None else "megatron_dms"
        target = dms.stored(tensors.dms_fields, tensors.reached_cr, dms_format or default)
        if target is None:
            cls._refuse_dense(tensors, source, dms_format)
            return cls(tensors.side_folder, {CONFIG: None}, (), frozenset({CONFIG}))
        config = dms.write_config(tensors.config, source, target, tensors.model.family)
        metadata = dms.write_metadata(tensors.dms_metadata, target, tensors.model.positions)
        content = {} if metadata is None else {dms.METADATA: metadata}
        content[CONFIG] = config  # last: without it nobody takes a folder for a model
        ours = tuple(Path(file) for file in hf.export_files())
        runs_ours = hf.MODELING_MODULE in str(config.get("auto_map"))
        brought_ours = source is not None and source.format == "megatron_dms"
        stale = () if target == source else (dms.METADATA,)
        before = {CONFIG: tensors.config, dms.METADATA: tensors.dms_metadata}
        return cls(
            tensors.side_folder,
            {name: None if value is before[name] else value for name, value in content.items()},
            ours if runs_ours else (),
            frozenset({CONFIG, *stale, *(file.name for file in ours if brought_ours)}),
        )

    @staticmethod
    def _refuse_dense(tensors: MegatronTensors, source: dms.DMS | None, dms_format: str | None) -> None:
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
        """Write the files into an export, config.json last."""
        for file in self.code:
            copy_file(file, out / file.name)
        for name, value in self.content.items():
            if value is None:
                copy_file(self.source / name, out / name)
            else:
                (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
