"""The keys of config.json: typed reads, features that must be off, keys that change no computation."""

import json
from collections.abc import Iterable, Mapping

from megatron_dms.conversion import dms_formats
from megatron_dms.errors import CheckpointError

Config = Mapping[str, object]

DTYPES = ("float32", "bfloat16", "float16")
"""The types of parameters that can be converted."""

_MOST = 2**40
"""A bound that no count of a model reaches."""
_READ = frozenset(
    "architectures model_type hidden_size num_attention_heads num_key_value_heads head_dim num_hidden_layers "
    "intermediate_size vocab_size max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta "
    "rope_scaling rope_parameters partial_rotary_factor torch_dtype dtype".split()
)

_OFF: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, [], None),
    "tie_encoder_decoder": (False, None),
}
"""Features of transformers that this project does not reproduce, with the values that mean "not in use"."""

_WITHOUT_EFFECT = frozenset(
    # sliding_window and max_window_layers act only with use_sliding_window or a layer type, both checked (and
    # in Mistral, whose family file checks it)
    "sliding_window max_window_layers initializer_range use_cache transformers_version auto_map "
    "_name_or_path bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id "
    # what older transformers dumped of PretrainedConfig: generation, outputs, tasks
    "bad_words_ids begin_suppress_tokens chunk_size_feed_forward diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
    "forced_bos_token_id forced_eos_token_id id2label label2id length_penalty max_length min_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_scores prefix problem_type remove_invalid_values repetition_penalty "
    "return_dict return_dict_in_generate suppress_tokens task_specific_params temperature "
    "tf_legacy_loss tokenizer_class top_k top_p torchscript typical_p use_bfloat16 "
    "is_llama_config transformers.js_config "  # SmolLM2's
    "attn_implementation _attn_implementation _attn_implementation_autoset".split()
)


def check_known(config: Config, of_family: Iterable[str]) -> None:
    """Check that every key is known (`of_family` included): an unread setting could change the model."""
    known = set(of_family) | _READ | _OFF.keys() | _WITHOUT_EFFECT | dms_formats.CONFIG_KEYS | {"layer_types"}
    unknown = sorted(set(config) - known)
    if unknown:
        raise CheckpointError(
            f"config.json: unknown keys {unknown}; remove them if they have no effect, or teach "
            "megatron_dms/conversion/families/config_keys.py what they mean"
        )


def check_off(config: Config, of_family: Mapping[str, tuple[object, ...]]) -> None:
    """Check that no feature is in use that is not reproduced, of every family or `of_family`."""
    absent = [key for key in of_family if key not in config]
    if absent:
        raise CheckpointError(
            f"config.json: {absent[0]} is missing, and its default is not known; set it to "
            f"{json.dumps(of_family[absent[0]][0])} if that is what the model was trained with"
        )
    for key, off in {**_OFF, **of_family}.items():
        if key in config and config[key] not in off:
            raise CheckpointError(
                f"config.json: {key} is {config[key]!r}, which is not supported, expected {off[0]!r}"
            )
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise CheckpointError(
                f"config.json: layer_types {layer_types!r} is not supported, expected only full_attention"
            )
        if len(layer_types) != config.get("num_hidden_layers"):
            raise CheckpointError(
                f"config.json: layer_types names {len(layer_types)} layers, "
                f"but num_hidden_layers is {config.get('num_hidden_layers')}"
            )


def count(config: Config, key: str, default: int | None = None) -> int:
    """Read a whole number above 0."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MOST:
        raise CheckpointError(f"config.json: {key} is {str(value)[:80]}, expected a whole number above 0")
    return value


def flag(config: Config, key: str, default: bool) -> bool:
    """Read true or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected true or false")
    return value


def norm_epsilon(config: Config) -> float:
    """Read the epsilon of RMSNorm."""
    value = config.get("rms_norm_eps")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise CheckpointError(f"config.json: rms_norm_eps is {value!r}, expected a number between 0 and 1")
    return float(value)


def dtype(config: Config) -> str | None:
    """Read the type of the parameters: `dtype` (transformers 5) or `torch_dtype` (older versions)."""
    found = {str(config[key]) for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    if len(found) > 1 or not found <= set(DTYPES):
        raise CheckpointError(f"config.json: dtype is {sorted(found)}, expected one of {', '.join(DTYPES)}")
    return found.pop() if found else None
