"""The arguments in a Megatron checkpoint, compared with the model of a config.json.

The same tensors are another model under other arguments: another RoPE, epsilon, activation or attention. So
each argument is compared, must be off, or is known to say nothing about the model
(megatron_argument_names.py). Checkpoints that Megatron-LM itself wrote hold its arguments and no
`rope_parameters`, by which an import of this project is known.
"""

from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from megatron_dms.conversion.megatron_argument_names import (
    COMPLETED,
    OF_OTHER_VERSIONS,
    OF_THE_RUN,
    WITHOUT_THEIR_FEATURE,
)
from megatron_dms.conversion.rope import RopeParameters, attention_factor, inverse_frequencies
from megatron_dms.conversion.training_args import ARCHITECTURE, differences
from megatron_dms.errors import CheckpointError, some

if TYPE_CHECKING:
    from megatron_dms.conversion.families import Model

OFF: Mapping[str, tuple[object, ...]] = {
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "qk_l2_norm": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_interleaved": (False,),
    "rope_type": (None, "rope"),
    "no_rope_freq": (None,),
    "mrope_section": (None,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "window_attn_skip_freq": (None,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "openai_gelu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "use_mup": (False,),
    "num_experts": (None,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (False,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "retro_add_retriever": (False,),  # of older versions
    "spec": (None,),
    "yaml_cfg": (None,),
}
"""Arguments that make another model of the same tensors -> the values that mean "not in use"."""
WINDOW = "window_size"
ROPE = ("rotary_base", "use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor")
HANDLED = frozenset({*ARCHITECTURE, *OFF, *ROPE, WINDOW})
"""The arguments that are compared or must be off."""
HARMLESS = OF_THE_RUN | WITHOUT_THEIR_FEATURE | COMPLETED | OF_OTHER_VERSIONS

_OURS, _OUR_PREFIX = ("dms", "load_hf"), "dms_"  # what these say stands in args.dms, which is read elsewhere
_DEFAULTS: Mapping[str, object] = {
    "group_query_attention": False,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 1.0,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5,
    "qk_layernorm": False,
    "swiglu": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": False,
    "rotary_base": 10000,
}
"""What Megatron takes where a checkpoint of another version stores no such argument."""
_MEGATRON_LLAMA3: RopeParameters = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192.0,
}
"""What --use-rope-scaling computes. Megatron-LM's pretraining scripts build the model with factor 8 whatever
--rope-scaling-factor says (checked on 0.19.2 and in the public repository's builders).
"""


def check_arguments(
    args: Namespace, model: "Model", where: str, config: str, accepted: Collection[str]
) -> None:
    """Raise CheckpointError if the arguments make another model of the tensors than config.json does.

    where, config: the checkpoint and the config.json, by which messages name them. accepted: names of
    arguments that this project does not know and the user lets through.
    """
    stored, expected = vars(args), model.family.megatron_args(model)
    foreign = stored.get("rope_parameters") is None
    if foreign:
        # Megatron-LM's vocab_size is the tokenizer's; the rows of the tensors are checked by themselves
        left_out = {"vocab_size", "rotary_base"}
        stored = _with_defaults(stored, {*stored, *_DEFAULTS} - left_out)
    for name, found, wanted in differences(Namespace(**stored), expected):
        raise CheckpointError(f"{where} has {name} {found!r:.80}, but {config} needs {wanted!r}")
    for name, found, off in _in_use(args, model.positions):
        raise CheckpointError(
            f"{where} was trained with {name} {found!r:.80}, which no config.json of this project's families "
            f"says; only {off!r} can be exported"
        )
    if foreign:
        _check_rope(vars(args), model, where, config)
    unknown = [name for name, value in vars(args).items() if not _is_known(name) and not _is_empty(value)]
    unknown = sorted(set(unknown) - set(accepted))
    if unknown:
        raise CheckpointError(
            f"{where} has arguments that this project does not know: {some(unknown)}; let one that does not "
            f"change the model through with --accept-argument {unknown[0]}"
        )


def _with_defaults(stored: Mapping[str, object], names: Collection[str]) -> dict[str, object]:
    """Return the named arguments, in the place of one that is not set Megatron's default."""
    found = {name: stored.get(name) for name in names}
    return {name: _DEFAULTS.get(name) if value is None else value for name, value in found.items()}


def _in_use(args: Namespace, positions: int) -> Iterator[tuple[str, object, object]]:
    """Yield (name, value, the value that means off) of each argument of `OFF` that is not off."""
    for name, off in OFF.items():
        found = getattr(args, name, off[0])
        if not (found is None or any((found == value) is True for value in off)):
            yield name, found, off[0]
    window = getattr(args, WINDOW, None)
    if window is not None and not _hides_nothing(window, positions):
        yield WINDOW, window, None
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if factor is not None and getattr(args, "rope_parameters", None) is not None:
        yield "rotary_seq_len_interpolation_factor", factor, None  # acts on top of the stored frequencies


def _hides_nothing(window: object, positions: int) -> bool:
    """Whether (tokens to the left, to the right) spans the context; -1 means without a bound."""
    left = window[0] if isinstance(window, tuple | list) and window else None
    return isinstance(left, int) and (left == -1 or left >= positions - 1)


def _check_rope(stored: Mapping[str, object], model: "Model", where: str, config: str) -> None:
    """Compare the frequencies that Megatron-LM computes with those of config.json."""
    told = _with_defaults(stored, ROPE)
    rope: RopeParameters = {
        "rope_type": "default",
        "rope_theta": _number(told["rotary_base"], "rotary_base", where),
    }
    if told["use_rope_scaling"]:
        rope |= _MEGATRON_LLAMA3
    found = inverse_frequencies(rope, model.head_size)
    factor = told["rotary_seq_len_interpolation_factor"]
    if factor is not None:
        found = found / _number(factor, "rotary_seq_len_interpolation_factor", where)
    wanted = inverse_frequencies(model.rope, model.head_size)
    if attention_factor(model.rope) == 1 and torch.allclose(found, wanted, rtol=1e-5, atol=0.0):
        return
    said = ", ".join(f"{name} {value}" for name, value in told.items())
    note = ""
    if told["use_rope_scaling"]:
        note = (
            " (--use-rope-scaling means factor 8, low and high factors 1 and 4 and an original context of "
            "8192 in Megatron-LM's scripts, whatever --rope-scaling-factor says)"
        )
    raise CheckpointError(
        f"{where} was trained with {said}{note}, but {config} says {model.rope}: other frequencies; give "
        "config.json in --hf-source the RoPE of the training"
    )


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"{where} has {name} {value!r:.80}, expected a number above 0")
    return float(value)


def _is_known(name: str) -> bool:
    return name in HANDLED or name in HARMLESS or name in _OURS or name.startswith(_OUR_PREFIX)


def _is_empty(value: object) -> bool:
    """Whether a value means off for an argument of any kind."""
    return value is None or (isinstance(value, bool | int | float | str | list | tuple | dict) and not value)
