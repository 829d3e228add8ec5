"""Rotary position embedding: read and check HF's settings, and compute the frequencies that Megatron must
use.

Megatron's own flags are not enough (checked on megatron-core 0.19.2): `--use-rope-scaling` knows Llama 3's
scaling with fixed low and high factors and a fixed original context of 8192, `gpt_config_from_args` drops
`--rope-scaling-factor`, so that 8 is used for every model (Llama 3.2 has 32), and linear and dynamic scaling
are not there. `set_rope` gives the model the exact frequencies instead, whatever the flags said.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch

from megatron_dms.errors import CheckpointError
from megatron_dms.upstream.megatron_rope import set_attention_factor

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

RopeParameters = dict[str, str | float]

_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_LARGEST = 1e30
_YARN_DEFAULTS: dict[str, float] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": (
        *_YARN_DEFAULTS,
        *("original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"),
    ),
}


def rope_parameters(config: Mapping[str, object]) -> RopeParameters:
    """Return a config.json's RoPE settings in one form: {"rope_type", "rope_theta", the type's own numbers}.

    Two spellings exist: `rope_parameters` (transformers 5), and `rope_theta` with `rope_scaling` (before).
    The settings of yarn are completed: "attention_factor" multiplies cosine and sine, "truncate" is 0 or 1.
    Raises CheckpointError for a type or a setting that this project cannot reproduce.
    """
    found: dict[str, object] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {key} is {value!r}, expected an object or null")
        for name, part in value.items():
            if found.setdefault(name, part) != part:
                raise CheckpointError(
                    f"config.json: RoPE's {name} is {found[name]!r} in rope_scaling and {part!r} in "
                    "rope_parameters; keep one"
                )
    legacy_type = found.pop("type", None)
    rope_type = found.pop("rope_type", legacy_type or "default")
    if legacy_type is not None and legacy_type != rope_type:
        raise CheckpointError(
            f"config.json: RoPE has type {legacy_type!r} and rope_type {rope_type!r}; keep one"
        )
    if not isinstance(rope_type, str) or rope_type not in _NEEDED:
        raise CheckpointError(
            f"config.json: RoPE type {rope_type!r} is unknown, expected one of {', '.join(_NEEDED)}; "
            "add it to megatron_dms/conversion/rope.py"
        )
    theta = found.pop("rope_theta", config.get("rope_theta", 10000.0))
    if "rope_theta" in config and config["rope_theta"] is not None and config["rope_theta"] != theta:
        raise CheckpointError(
            f"config.json: rope_theta is {config['rope_theta']} and {theta} within rope_parameters; keep one"
        )
    partial = found.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise CheckpointError(f"config.json: partial_rotary_factor {partial} is not supported, expected 1.0")
    found.pop("finetuned", None)  # a note of YaRN's authors
    if rope_type == "yarn" and "attn_factor" in found:
        _check_attn_factor(found.pop("attn_factor"), found)
    needed, optional = _NEEDED[rope_type], _OPTIONAL.get(rope_type, ())
    missing = [key for key in needed if key not in found]
    extra = sorted(set(found) - set(needed) - set(optional))
    if missing or extra:
        raise CheckpointError(
            f"config.json: RoPE type {rope_type!r} has missing keys {missing} and unknown keys {extra}; "
            f"expected {list(needed)}" + (f", and optionally {sorted(optional)}" if optional else "")
        )
    truncate = found.pop("truncate", None)
    if truncate not in (None, True, False):
        raise CheckpointError(f"config.json: RoPE's truncate is {truncate!r}, expected true or false")
    given = {key: value for key, value in found.items() if value is not None or key in needed}
    numbers: dict[str, float] = {}
    for key, value in {"rope_theta": theta, **given}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
            raise CheckpointError(f"config.json: RoPE's {key} is {value!r}, expected a number above 0")
        numbers[key] = value
    if rope_type == "yarn":
        numbers = _complete_yarn(numbers, truncate, config.get("max_position_embeddings"))
    return {"rope_type": rope_type, **numbers}


def _check_attn_factor(given: object, found: Mapping[str, object]) -> None:
    """Check that transformers, which ignores YaRN's attn_factor, and vLLM, which ignores attention_factor,
    compute the same model.
    """
    factor = found.get("factor")
    if not _is_number(given) or not _is_number(factor):
        raise CheckpointError(
            f"config.json: RoPE's attn_factor is {given!r:.80}, expected a number; remove it"
        )
    scale = _yarn_scale(factor, 1.0)
    vllm = scale * given
    said = found.get("attention_factor")
    if not _is_number(said):
        said = scale
    if not math.isclose(said, vllm, rel_tol=1e-3):
        raise CheckpointError(
            f"config.json: RoPE's attn_factor {given} makes two models: transformers ignores it (cosine and "
            f"sine are multiplied by {said:.4g}), vLLM reads it (multiplied by {vllm:.4g}); for vLLM's model "
            f'add "attention_factor": {vllm:.10g} beside it, for that of transformers remove it'
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST


def _complete_yarn(numbers: Mapping[str, float], truncate: object, positions: object) -> dict[str, float]:
    """Give the settings that are left out the values of transformers, and make one attention factor of the
    two scales m.
    """
    complete = dict(_YARN_DEFAULTS)
    if isinstance(positions, int | float):
        complete["original_max_position_embeddings"] = positions
    complete |= numbers
    if truncate is not None:
        complete["truncate"] = bool(truncate)
    if complete["rope_theta"] <= 1:
        raise CheckpointError(
            f"config.json: RoPE's rope_theta is {complete['rope_theta']}, expected more than 1 for yarn"
        )
    mscale, mscale_all = complete.pop("mscale", None), complete.pop("mscale_all_dim", None)
    if "attention_factor" not in complete:
        factor = float(complete["factor"])
        if mscale and mscale_all:
            complete["attention_factor"] = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
        else:
            complete["attention_factor"] = _yarn_scale(factor, 1.0)
    return complete


def _yarn_scale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def attention_factor(rope: Mapping[str, str | float]) -> float:
    """Return the factor on cosine and sine, which is 1 except for yarn."""
    return float(rope.get("attention_factor", 1.0))


def inverse_frequencies(rope: Mapping[str, str | float], head_size: int) -> torch.Tensor:
    """Return the angle per position of each pair of channels, fp32 [head_size / 2].

    For dynamic scaling these are the angles of texts up to max_position_embeddings, where the scaling changes
    nothing. Beyond, the angles would depend on the text's length.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu").float() / head_size
    periods = float(rope["rope_theta"]) ** exponent  # over 2 pi
    match rope["rope_type"]:
        case "linear":
            return 1.0 / periods / float(rope["factor"])
        case "yarn":
            return _yarn_frequencies(rope, periods)
        case "llama3":
            return _llama3_frequencies(rope, 1.0 / periods)
    return 1.0 / periods


def _llama3_frequencies(rope: Mapping[str, str | float], frequencies: torch.Tensor) -> torch.Tensor:
    """Scale as Llama 3: pairs that turn fewer than `low_freq_factor` times within the original context are
    slowed down by `factor`, pairs that turn more than `high_freq_factor` times are left alone, and between
    the two the change is gradual.
    """
    factor, low, high, context = (float(rope[key]) for key in _NEEDED["llama3"])
    wavelength = 2 * math.pi / frequencies
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(wavelength > context / low, frequencies / factor, frequencies)
    between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(between, blended, scaled)


def _yarn_frequencies(rope: Mapping[str, str | float], periods: torch.Tensor) -> torch.Tensor:
    """Scale as llama3, but the change is linear in the number of the pair, between the pairs that turn
    `beta_fast` and `beta_slow` times within the original context (rounded outwards to whole pairs where
    `truncate`).
    """
    theta, context = float(rope["rope_theta"]), float(rope["original_max_position_embeddings"])
    pairs = periods.numel()

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(context / (times * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(float(rope["beta_fast"])), pair_that_turns(float(rope["beta_slow"]))
    if rope["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001  # as transformers does, against a division by zero
    slowed = ((torch.arange(pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - slowed  # from here as transformers rounds: at position 131071 an ulp of a frequency shows
    return 1.0 / (float(rope["factor"]) * periods) * (1 - kept) + 1.0 / periods * kept


def set_rope(model: "GPTModel", rope: Mapping[str, str | float]) -> None:
    """Give a Megatron GPTModel the exact frequencies and attention factor of `rope`, in place, before its
    first forward.

    Raises CheckpointError if the model has no rotary embedding or one of another size (a wrong --kv-channels,
    --rotary-percent or --position-embedding-type), or fuses RoPE in a way that takes no attention factor.
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
    set_attention_factor(model, attention_factor(rope))
