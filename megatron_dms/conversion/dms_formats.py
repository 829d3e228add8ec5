"""The DMS settings of a checkpoint in three formats on HF's side, and the tensors of the predictor.

megatron_dms   keys in config.json: NVIDIA's, and two that say what NVIDIA's format leaves implicit
nvidia         keys in config.json (nvidia/Qwen3-8B-DMS-8x; lag 1; linear or query_channel)
fastdms        a file dms_metadata.json beside the weights (lag 0; query_channel; a decision per head; the
               borrowed channel is zeroed before RoPE only, as in FastDMS's runtime, not in its trainer)

In between, the settings are one DMSSettings (hf/configuration_dms.py). On Megatron's side, `args.dms` is a
plain dict of them, to which training adds its own settings; an export leaves those out. A base model has no
`args.dms`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_dms import hf
from megatron_dms.compression_method import method_of
from megatron_dms.conversion.transforms import HF_LAYERS, MEGATRON_LAYERS, Rename, Row
from megatron_dms.errors import CheckpointError
from megatron_dms.hf.configuration_dms import KNOWN_KEYS, LATER_FIELDS, OTHER_RUNTIME_KEYS, DMSSettings

METADATA = "dms_metadata.json"
CONFIG_KEYS = KNOWN_KEYS | OTHER_RUNTIME_KEYS
Object = Mapping[str, Any]

_OUR_KEYS = ("dms_predictor", "dms_lag")
_LOADED_BY = "AutoModelForCausalLM"
_LOADING = ("architectures", "model_type", "auto_map")
_FASTDMS = {"alpha_scale": "alpha_scale", "alpha_offset": "alpha_offset", "window": "window_size"}
"""Field of DMSSettings -> key of dms_metadata.json, which must have all of these keys."""
_FASTDMS_LEAVES_OUT: dict[str, Any] = {
    "predictor": "query_channel",
    "granularity": "head",
    "lag": 0,
    "zeroing": "before_rope",
}
"""What every model in the format does: found by running FastDMS's own code beside ours."""
_BLOCK_SIZE, _NVIDIA_BLOCK_SIZE = "dms_paged_attention_block_size", 256
"""NVIDIA's key for the tokens of a page of its cache, and its default."""
_OF_OTHER_SCHEMA = ("sidecar", "decision_source", "schema_version")
"""Keys of later files of the same name, whose predictor is stored apart from the model."""


@dataclass(frozen=True)
class DMS:
    """The DMS settings of an HF checkpoint, and the format that holds them (one of FORMATS)."""

    settings: DMSSettings
    format: str

    @property
    def fields(self) -> dict[str, object]:
        """The settings as in `args.dms`."""
        return self.settings.stored()

    @property
    def reached_cr(self) -> float | None:
        """The compression ratio that training had asked for; None where the checkpoint does not say it."""
        return self.settings.target_cr


def read(config: Object, metadata: Object | None) -> DMS | None:
    """Return the settings of a config.json and of a dms_metadata.json if there is one; None for a base model.

    Raises CheckpointError where keys are unknown, missing or disagree.
    """
    from_config = _read_config(config)
    if metadata is None:
        return from_config
    from_metadata = _read_metadata(metadata)
    if from_config is None:
        return from_metadata
    for name in (*from_metadata.fields, "target_cr"):
        said, value = getattr(from_config.settings, name), getattr(from_metadata.settings, name)
        if name != "temperature" and value is not None and said != value:  # FastDMS has no temperature
            means = f"means {name} {value!r}" if name in _FASTDMS_LEAVES_OUT else f"says {value!r}"
            raise CheckpointError(
                f"config.json says {name} {said!r}, but {METADATA} {means}; remove the one that is wrong"
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
    return DMS(settings, "megatron_dms" if any(key in config for key in _OUR_KEYS) else "nvidia")


def _read_metadata(metadata: Object) -> DMS:
    values = _metadata_config(metadata)
    other = sorted(key for key in _OF_OTHER_SCHEMA if key in metadata or key in values)
    missing = sorted(set(_FASTDMS.values()) - set(values))
    if other:
        raise CheckpointError(f"{METADATA} has {other}: a predictor in a file of its own is not supported")
    if missing:
        raise CheckpointError(f"{METADATA} lacks {missing} under config; fetch it again")
    given = {field: values[key] for field, key in _FASTDMS.items()}
    try:
        settings = DMSSettings(**given, **_FASTDMS_LEAVES_OUT, target_cr=values.get("target_cr"))
    except ValueError as error:
        raise CheckpointError(f"{METADATA}: {error}") from error
    return DMS(settings, "fastdms")


def _metadata_config(metadata: Object) -> Object:
    """Return the object "config" of the file, or the file itself, which FastDMS also takes."""
    values = metadata.get("config", metadata)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{METADATA}: config is {values!r}, expected an object")
    return values


def write_config(config: Object, source: DMS | None, target: DMS, family: Any) -> Object:
    """Return the config.json of an export: `config` itself where it says `target` already.

    Args:
        config: the config.json of the side files.
        source: the settings that `config` holds now. Within one format only the DMS keys that change are
            touched, so that code which came with the checkpoint keeps running it.
        family: the model's Family.
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
        config = {**config, "model_type": family.model_type}
    if target.format == "fastdms":
        _only(target, _FASTDMS_LEAVES_OUT)
        return {**config, "architectures": [family.architectures[0]]}
    entries = config_entries(target.settings, family.model_type)
    if target.format == "nvidia":
        _only(target, {"lag": 1, "zeroing": "around_rope"})
        if target.settings.predictor == "key_channel":
            raise CheckpointError("the format nvidia knows no key_channel; use --dms-format megatron_dms")
        entries = {key: value for key, value in entries.items() if key not in (*_OUR_KEYS, "model_type")}
        entries["auto_map"] = {_LOADED_BY: entries["auto_map"][_LOADED_BY]}
    if source is not None and source.format == target.format:
        now = source.settings.to_entries()
        # An earlier version's export has the base model's type: these keys go with the code files.
        ours = _LOADING if target.format == "megatron_dms" else ()
        entries = {
            key: value for key, value in entries.items() if key in ours or (key in now and now[key] != value)
        }
    if target.format == "nvidia":
        entries |= _block_size(config, target.settings.window)
    return {**config, **entries}


def _block_size(config: Object, window: int) -> dict[str, object]:
    """Return the key with which NVIDIA's config class takes the window: it asserts a block size below it."""
    found = config.get(_BLOCK_SIZE, _NVIDIA_BLOCK_SIZE)
    if isinstance(found, int) and found < window:
        return {}
    if window < 2:  # a block has one token at least
        raise CheckpointError(
            f"the format nvidia knows only windows of 2 tokens and more, the checkpoint has {window}; use "
            "--dms-format megatron_dms"
        )
    return {_BLOCK_SIZE: 1 << ((window - 1).bit_length() - 1)}


def write_metadata(metadata: Object | None, target: DMS, positions: int) -> Object | None:
    """Return the dms_metadata.json of an export; None where the format has no such file.

    `metadata`, which the source had, is returned itself where it says `target` already.
    """
    if target.format != "fastdms":
        return None
    if metadata is not None and _read_metadata(metadata) == target:
        return metadata
    values: dict[str, Any] = {"context_len": positions, "compression_mode": None}
    values |= _metadata_config(metadata) if metadata is not None else {}
    values |= {key: getattr(target.settings, field) for field, key in _FASTDMS.items()}
    return {**(metadata or {}), "config": {**values, "target_cr": _tidy(target.reached_cr)}}


def config_entries(settings: DMSSettings, model_type: str) -> dict[str, Any]:
    """Return all keys of config.json with which the exported model (hf/) does what the settings say."""
    try:
        return hf.config_entries(model_type, replace(settings, target_cr=_tidy(settings.target_cr)))
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's args.dms cannot be exported: {error}") from error


def stored(fields: Mapping[str, Any] | None, reached_cr: float | None, format: str) -> DMS | None:
    """Return the settings of `args.dms` (None: a base model), to be exported in a format."""
    if fields is None:
        return None
    names = DMSSettings.stored_names(method_of(fields).name)
    missing = sorted(set(names) - set(fields))
    if missing:
        raise CheckpointError(f"the checkpoint's args.dms lacks {missing}; was it saved by another version?")
    try:
        values = {name: fields[name] for name in (*names, *LATER_FIELDS) if name in fields}
        settings = DMSSettings(**values, target_cr=reached_cr)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: a setting is a tensor
        raise CheckpointError(f"the checkpoint's args.dms cannot be exported: {error}") from error
    return DMS(settings, format)


def _only(target: DMS, expected: Mapping[str, object]) -> None:
    for name, value in expected.items():
        if (found := getattr(target.settings, name)) != value:
            raise CheckpointError(
                f"the format {target.format} knows only {name} {value!r}, the checkpoint has {found!r}; use "
                "--dms-format megatron_dms"
            )


def _tidy(ratio: float | None) -> float | None:
    """Return 8 for 8.0, as the other formats write it."""
    return int(ratio) if isinstance(ratio, float) and ratio.is_integer() else ratio


def predictor_rows(hidden: int, groups: int, bias: bool) -> list[Row]:
    """Return the rows of the linear predictor: norm [H], projection [G, H] and, with biases, [G].

    The other predictors borrow a channel and have no tensors of their own. bias: whether the attention has
    biases.
    """
    ours, theirs = MEGATRON_LAYERS + "self_attention.dms_predictor.", HF_LAYERS + "self_attn.dms_proj_alpha"
    rows: list[Row] = [
        Rename(ours + "norm.weight", (theirs + "_norm.weight",), ((hidden,),)),
        Rename(ours + "proj.weight", (theirs + ".weight",), ((groups, hidden),)),
    ]
    if bias:
        rows.append(Rename(ours + "proj.bias", (theirs + ".bias",), ((groups,),)))
    return rows
