"""Model families: one file for each `model_type` of config.json."""

from collections.abc import Collection, Mapping

from megatron_dms.conversion.families import llama, mistral, qwen2, qwen3
from megatron_dms.conversion.families.decoder import Family, Model
from megatron_dms.errors import CheckpointError
from megatron_dms.hf import base_model_type

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)
}


def read_model(
    config: Mapping[str, object],
    dms_metadata: Mapping[str, object] | None = None,
    accepted_keys: Collection[str] = (),
    head_size: int | None = None,
) -> Model:
    """Check a parsed config.json (and dms_metadata.json, where there is one) against its family.

    accepted_keys: unknown keys of config.json that the user lets through. head_size: what the tensors say,
    for a config.json whose head_dim is null.

    Raises CheckpointError for anything not understood.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(base_model_type(model_type)) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is unknown, expected one of {', '.join(FAMILIES)}; "
            "a new family is one file in megatron_dms/conversion/families"
        )
    return family.read(config, dms_metadata, accepted_keys, head_size)


def megatron_args(config: Mapping[str, object]) -> dict[str, object]:
    """Megatron's arguments (names as in its `args` namespace) that rebuild the model of a config.json."""
    model = read_model(config)
    return model.family.megatron_args(model)


__all__ = ["FAMILIES", "Family", "Model", "megatron_args", "read_model"]
