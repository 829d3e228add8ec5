"""Rotary position embedding: HF's settings read, checked and turned into the frequencies that Megatron must
use.

Megatron's own flags are not enough (checked on megatron-core 0.19.2): `--use-rope-scaling` knows Llama 3's
scaling with fixed low and high factors and a fixed original context of 8192, and `gpt_config_from_args`
drops `--rope-scaling-factor`, so that 8 is used for every model (Llama 3.2 has 32). `set_rope` gives the
model the exact frequencies instead, whatever the flags said.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from megatron_dms.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

RopeParameters = dict[str, str | float]

_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope_parameters(config: Mapping[str, object]) -> RopeParameters:
    """RoPE settings of a config.json, in one form: {"rope_type", "rope_theta", and the type's own numbers}.

    Two spellings exist: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling` (before).
    Raises CheckpointError for a type or a setting that this project cannot reproduce.
    """
    found: dict[str, object] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {key} is {value!r}, expected an object or null")
        found.update(value)
    legacy_type = found.pop("type", None)
    rope_type = found.pop("rope_type", legacy_type or "default")
    if legacy_type is not None and legacy_type != rope_type:
        raise CheckpointError(
            f"config.json: RoPE has type {legacy_type!r} and rope_type {rope_type!r}; keep one"
        )
    if rope_type not in _NEEDED:
        raise CheckpointError(
            f"config.json: RoPE type {rope_type!r} is unknown, expected one of {', '.join(_NEEDED)}; "
            "add it to megatron_dms/checkpoint/rope.py"
        )
    theta = found.pop("rope_theta", config.get("rope_theta", 10000.0))
    if "rope_theta" in config and config["rope_theta"] is not None and config["rope_theta"] != theta:
        raise CheckpointError(
            f"config.json: rope_theta is {config['rope_theta']} and {theta} within rope_parameters; keep one"
        )
    partial = found.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise CheckpointError(f"config.json: partial_rotary_factor {partial} is not supported, expected 1.0")
    needed = _NEEDED[rope_type]
    missing = [key for key in needed if key not in found]
    extra = sorted(set(found) - set(needed))
    if missing or extra:
        raise CheckpointError(
            f"config.json: RoPE type {rope_type!r} has missing keys {missing} and unknown keys {extra}; "
            f"expected exactly {list(needed)}"
        )
    numbers = {"rope_theta": theta, **{key: found[key] for key in needed}}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"config.json: RoPE's {key} is {value!r}, expected a number above 0")
    return {"rope_type": rope_type, **numbers}


def inverse_frequencies(rope: Mapping[str, str | float], head_size: int) -> torch.Tensor:
    """Angle per position of each pair of channels, fp32 [head_size / 2].

    llama3: pairs that turn fewer than `low_freq_factor` times within the original context are slowed down
    by `factor`, those that turn more than `high_freq_factor` times are left alone, and between the two the
    change is gradual.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu").float() / head_size
    frequencies = 1.0 / (float(rope["rope_theta"]) ** exponent)
    if rope["rope_type"] == "default":
        return frequencies
    factor, low, high, context = (float(rope[key]) for key in _NEEDED["llama3"])
    wavelength = 2 * math.pi / frequencies
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(wavelength > context / low, frequencies / factor, frequencies)
    between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(between, blended, scaled)


def set_rope(model: "GPTModel", rope: Mapping[str, str | float]) -> None:
    """Give a Megatron GPTModel the exact frequencies of `rope`, in place, before its first forward.

    Raises CheckpointError if the model has no rotary embedding or one of another size (a wrong --kv-channels,
    --rotary-percent or --position-embedding-type).
    """
    embedding = getattr(model, "rotary_pos_emb", None)
    if embedding is None:
        raise CheckpointError("the model has no rotary embedding; use --position-embedding-type rope")
    old = embedding.inv_freq
    new = inverse_frequencies(rope, 2 * old.numel())
    if 2 * old.numel() != model.config.kv_channels:
        raise CheckpointError(
            f"the Megatron model rotates {2 * old.numel()} channels of {model.config.kv_channels}, "
            "expected all; use --rotary-percent 1.0"
        )
    embedding.inv_freq = new.to(device=old.device, dtype=old.dtype)
