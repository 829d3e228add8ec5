"""DMS settings of a checkpoint: three formats on HF's side <-> `args.dms` on Megatron's <-> the predictor's
tensors.

megatron_dms   keys in config.json, those of NVIDIA's format and two that say what it leaves implicit
nvidia         keys in config.json (nvidia/Qwen3-8B-DMS-8x; lag 1; linear or query_channel)
fastdms        a file dms_metadata.json beside the weights (lag 1; query_channel; a decision per head)

`args.dms` is a plain dict of DMSConfig's fields: predictor, granularity, alpha_scale, alpha_offset, window,
lag, temperature, of a model that merges pairs also method and importance_* (and those of its training, which
an export leaves out). A base model has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dms import hf
from megatron_dms.compression_method import METHODS, CompressionMethod, method_of
from megatron_dms.conversion.transforms import HF_LAYERS, MEGATRON_LAYERS, Rename, Row
from megatron_dms.errors import CheckpointError
from megatron_dms.hf.configuration_dms import KNOWN_KEYS, OTHER_RUNTIME_KEYS, DMSSettings

METADATA = "dms_metadata.json"
CONFIG_KEYS = KNOWN_KEYS | OTHER_RUNTIME_KEYS
Object = Mapping[str, Any]

_FIELDS = ("predictor", "granularity", "alpha_scale", "alpha_offset", "window", "lag", "temperature")
"""Fields that DMSConfig and DMSSettings share: what a trained model means nothing without."""
_OUR_KEYS = ("dms_predictor", "dms_lag")
_FASTDMS = {"alpha_scale": "alpha_scale", "alpha_offset": "alpha_offset", "window": "window_size"}
"""Field -> key of dms_metadata.json; all are needed."""
_FASTDMS_LEAVES_OUT = {"predictor": "query_channel", "granularity": "head", "lag": 1}
_OF_OTHER_SCHEMA = ("sidecar", "decision_source", "schema_version")
"""Keys of later files of the same name, whose predictor is stored apart from the model."""


@dataclass(frozen=True)
class DMS:
    """DMS settings found in an HF checkpoint. fields: as in `args.dms`; reached_cr: None where it is not
    said; format: one of conversion_options.FORMATS.
    """

    fields: dict[str, object]
    reached_cr: float | None
    format: str


def read(config: Object, metadata: Object | None) -> DMS | None:
    """The settings of a config.json and, where there is one, of a dms_metadata.json; None for a base model.

    Raises CheckpointError where keys are unknown, missing or disagree.
    """
    from_config = _read_config(config)
    if metadata is None:
        return from_config
    from_metadata = _read_metadata(metadata)
    if from_config is None:
        return from_metadata
    said = {**from_config.fields, "compression ratio": from_config.reached_cr}
    for name, value in {**from_metadata.fields, "compression ratio": from_metadata.reached_cr}.items():
        if name != "temperature" and value is not None and said[name] != value:  # FastDMS has no temperature
            raise CheckpointError(
                f"config.json says {name} {said[name]!r}, but {METADATA} says {value!r}; remove the one that "
                "is wrong"
            )
    return from_config


def _read_config(config: Object) -> DMS | None:
    if not any(key.startswith("dms_") for key in config):
        return None
    try:
        settings = DMSSettings.from_entries(config)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error
    if settings.disable_eviction:
        raise CheckpointError(
            "config.json: dms_disable_eviction is true, expected false; Megatron stores no such switch: set "
            "it to false here, and to true again in the export"
        )
    kind = "megatron_dms" if any(key in config for key in _OUR_KEYS) else "nvidia"
    names = _field_names(METHODS[settings.method])
    return DMS({name: getattr(settings, name) for name in names}, settings.target_cr, kind)


def _field_names(method: CompressionMethod) -> tuple[str, ...]:
    return _FIELDS + method.exported_fields


def _read_metadata(metadata: Object) -> DMS:
    values = _metadata_config(metadata)
    other = sorted(key for key in _OF_OTHER_SCHEMA if key in metadata or key in values)
    missing = sorted(set(_FASTDMS.values()) - set(values))
    if other:
        raise CheckpointError(f"{METADATA} has {other}: a predictor in a file of its own is not supported")
    if missing:
        raise CheckpointError(f"{METADATA} lacks {missing} under config; fetch it again")
    fields = {field: values[key] for field, key in _FASTDMS.items()}
    try:
        settings = DMSSettings(**fields, **_FASTDMS_LEAVES_OUT, target_cr=values.get("target_cr"))
    except ValueError as error:
        raise CheckpointError(f"{METADATA}: {error}") from error
    return DMS({name: getattr(settings, name) for name in _FIELDS}, settings.target_cr, "fastdms")


def _metadata_config(metadata: Object) -> Object:
    """The settings are under "config"; FastDMS itself also takes them without."""
    values = metadata.get("config", metadata)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{METADATA}: config is {values!r}, expected an object")
    return values


def write_config(config: Object, source: DMS | None, target: DMS, family: Any) -> Object:
    """config.json of an export: `config` itself where it says `target` already.

    source: what `config` says now. family: the model's Family. Within one format only the DMS keys that
    change are touched, so that code which came with the checkpoint keeps running it.
    """
    if target == source:
        return config
    method = method_of(target.fields)
    if target.format not in method.formats:
        raise CheckpointError(
            f"the format {target.format} knows no {method.description}; use --dms-format megatron_dms"
        )
    if source is not None and source.format != target.format:
        config = {key: value for key, value in config.items() if key not in CONFIG_KEYS | {"auto_map"}}
    if target.format == "fastdms":
        _only(target, _FASTDMS_LEAVES_OUT)
        return config | {"architectures": [family.architectures[0]]}
    entries = config_entries(target.fields, family.model_type, target.reached_cr)
    if target.format == "nvidia":
        _only(target, {"lag": 1})
        if target.fields["predictor"] == "key_channel":
            raise CheckpointError("the format nvidia knows no key_channel; use --dms-format megatron_dms")
        entries = {key: value for key, value in entries.items() if key not in _OUR_KEYS}
    if source is not None and source.format == target.format:
        now = DMSSettings.from_entries(config).to_entries()
        entries = {key: value for key, value in entries.items() if key in now and now[key] != value}
    return {**config, **entries}


def write_metadata(metadata: Object | None, target: DMS, positions: int) -> Object | None:
    """dms_metadata.json of an export: `metadata`, which the source had, where it says `target` already; None
    where the format has no such file.
    """
    if target.format != "fastdms":
        return None
    if metadata is not None and _read_metadata(metadata) == target:
        return metadata
    values = {"context_len": positions, "compression_mode": None}
    values |= _metadata_config(metadata) if metadata is not None else {}
    values |= {key: target.fields[field] for field, key in _FASTDMS.items()}
    return {**(metadata or {}), "config": {**values, "target_cr": _tidy(target.reached_cr)}}


def config_entries(
    fields: Mapping[str, object], model_type: str, reached_cr: float | None
) -> dict[str, object]:
    """All keys of config.json with which the exported model (megatron_dms/hf) does what `args.dms` says."""
    values: dict[str, Any] = {name: fields[name] for name in _field_names(method_of(fields))}
    try:
        return hf.config_entries(model_type=model_type, target_cr=_tidy(reached_cr), **values)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's args.dms cannot be exported: {error}") from error


def stored(fields: Mapping[str, object] | None, reached_cr: float | None, format: str) -> DMS | None:
    """The settings of `args.dms` (None: a base model), to be exported in a format."""
    if fields is None:
        return None
    names = _field_names(method_of(fields))
    missing = sorted(set(names) - set(fields))
    if missing:
        raise CheckpointError(f"the checkpoint's args.dms lacks {missing}; was it saved by another version?")
    return DMS({name: fields[name] for name in names}, reached_cr, format)


def _only(target: DMS, expected: Mapping[str, object]) -> None:
    for name, value in expected.items():
        if target.fields[name] != value:
            raise CheckpointError(
                f"the format {target.format} knows only {name} {value!r}, the checkpoint has "
                f"{target.fields[name]!r}; use --dms-format megatron_dms"
            )


def _tidy(ratio: float | None) -> float | None:
    """8 and not 8.0, as the other formats write it."""
    return int(ratio) if isinstance(ratio, float) and ratio.is_integer() else ratio


def predictor_rows(fields: Mapping[str, object], hidden: int, groups: int, bias: bool) -> list[Row]:
    """Rows of the linear predictor: norm [H], projection [G, H] and, where the attention has biases, [G].

    The borrowed channels have no tensors of their own.
    """
    if fields["predictor"] != "linear":
        return []
    ours, theirs = MEGATRON_LAYERS + "self_attention.dms_predictor.", HF_LAYERS + "self_attn.dms_proj_alpha"
    rows: list[Row] = [
        Rename(ours + "norm.weight", (theirs + "_norm.weight",), ((hidden,),)),
        Rename(ours + "proj.weight", (theirs + ".weight",), ((groups, hidden),)),
    ]
    if bias:
        rows.append(Rename(ours + "proj.bias", (theirs + ".bias",), ((groups,),)))
    return rows
