"""DMS settings: NVIDIA's keys in config.json <-> `args.dms` of a Megatron checkpoint <-> the predictor's
tensors.

`args.dms` is a plain dict of DMSConfig's fields: predictor, granularity, alpha_scale, alpha_offset, window,
lag, temperature (and those of its training, which an export leaves out). A base model has none.
"""

from collections.abc import Mapping

from megatron_dms import hf
from megatron_dms.checkpoint.errors import CheckpointError
from megatron_dms.checkpoint.transforms import HF_LAYERS, MEGATRON_LAYERS, Rename, Row
from megatron_dms.hf.configuration_dms import KNOWN_KEYS, OTHER_RUNTIME_KEYS, DMSSettings

CONFIG_KEYS = KNOWN_KEYS | OTHER_RUNTIME_KEYS
_FIELDS = ("predictor", "granularity", "alpha_scale", "alpha_offset", "window", "lag", "temperature")
"""Fields that DMSConfig and DMSSettings share: what a trained model means nothing without."""


def from_config(config: Mapping[str, object]) -> tuple[dict[str, object] | None, float | None]:
    """`args.dms` and the compression ratio reached, of a config.json; both None for a base model.

    Raises CheckpointError where keys are unknown, missing or disagree.
    """
    if not any(key.startswith("dms_") for key in config):
        return None, None
    try:
        settings = DMSSettings.from_entries(config)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error
    if settings.disable_eviction:
        raise CheckpointError(
            "config.json: dms_disable_eviction is true, expected false; Megatron stores no such switch: set "
            "it to false here, and to true again in the export"
        )
    return {name: getattr(settings, name) for name in _FIELDS}, settings.target_cr


def config_entries(
    fields: Mapping[str, object], model_type: str, reached_cr: float | None
) -> dict[str, object]:
    """Keys that an exported config.json gets from `args.dms`."""
    missing = sorted(set(_FIELDS) - set(fields))
    if missing:
        raise CheckpointError(f"the checkpoint's args.dms lacks {missing}; was it saved by another version?")
    values = {name: fields[name] for name in _FIELDS}
    try:
        return hf.config_entries(model_type=model_type, target_cr=reached_cr, **values)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's args.dms cannot be exported: {error}") from error


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
