"""The keys of config.json: typed reads, features that must be off, keys that change no computation."""

import json
from collections.abc import Collection, Iterable, Mapping

from megatron_dms.conversion import dms_formats
from megatron_dms.errors import CheckpointError, some

Config = Mapping[str, object]

DTYPES = ("float32", "bfloat16", "float16")
"""The types of parameters that can be converted."""

_MOST_FLAGS = 3
_MOST = 2**40
"""A bound that no count of a model reaches."""
_READ = frozenset(
    "architectures model_type hidden_size num_attention_heads num_key_value_heads head_dim num_hidden_layers "
    "intermediate_size vocab_size max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta "
    "rope_scaling rope_parameters partial_rotary_factor torch_dtype dtype".split()
)
_SLIDING = ("sliding_window", "use_sliding_window", "layer_types")

_OFF: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
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
    # max_window_layers acts only with a sliding window, which is checked
    "max_window_layers initializer_range use_cache transformers_version auto_map "
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
    "attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal "
    # what programs note down: trainers, hubs, tokenizers, kernels
    "unsloth_fixed unsloth_version _commit_hash use_return_dict model_max_length tokenizer_padding_side "
    "neftune_noise_alpha internal_version _flash_attn_2_enabled finetuned max_sequence_length "
    "_from_model_config _auto_class trl_version peft_version axolotl_version llamafactory_version "
    "tokenizer_model_max_length tokenizer_name tokenizer_type padding_side pad_to_multiple_of pad_token "
    "bos_token eos_token unk_token mask_token_id cls_token_id image_token_id vocab_file chat_template "
    "use_flash_attention use_flash_attention_2 use_flash_attn flash_attention flash_attn use_xformers "
    "gradient_checkpointing use_gradient_checkpointing trust_remote_code keys_to_ignore_at_inference "
    "is_composition output_past base_model_tp_plan base_model_pp_plan torch_compile license author "
    "model_name model_name_or_path base_model dataset datasets language languages max_seq_len max_seq_length "
    "generation_config".split()
)
_MEANS: Mapping[str, str] = {
    "dual_chunk_attention_config": "transformers ignores it; vLLM attends in chunks, which up to chunk_size "
    "tokens changes nothing",
}
"""What is known of unknown keys that programs read differently."""


def check_known(config: Config, of_family: Iterable[str], accepted: Collection[str] = ()) -> None:
    """Check that every key is known: an unread setting could change the model.

    of_family: further known keys. accepted: unknown keys that the user lets through.
    """
    known = set(of_family) | _READ | _OFF.keys() | _WITHOUT_EFFECT | dms_formats.CONFIG_KEYS | set(_SLIDING)
    unknown = sorted(set(config) - known - set(accepted))
    if unknown:
        meaning = "".join(f" ({key}: {_MEANS[key]})" for key in unknown if key in _MEANS)
        flags = " ".join(f"--accept-config-key {key}" for key in unknown[:_MOST_FLAGS])
        raise CheckpointError(
            f"config.json: unknown keys {some(unknown)}{meaning}; if they do not change the model, import it "
            f"with {flags}" + (" and so on" if len(unknown) > _MOST_FLAGS else "")
        )


def check_sliding_window(config: Config, on_by_itself: bool, positions: int) -> None:
    """Check that no layer has a sliding window that hides anything within the context.

    on_by_itself: whether sliding_window is in use without use_sliding_window, as in Mistral.
    """
    window, use = config.get("sliding_window"), config.get("use_sliding_window")
    if use is not None and not isinstance(use, bool):
        raise CheckpointError(f"config.json: use_sliding_window is {use!r}, expected true or false")
    spans = type(window) is int and window >= positions
    layer_types = config.get("layer_types")
    if layer_types is not None:
        full = ("full_attention", "sliding_attention") if spans else ("full_attention",)
        if not isinstance(layer_types, list) or any(kind not in full for kind in layer_types):
            raise CheckpointError(
                f"config.json: layer_types {layer_types!s:.80} is not supported, expected only full_attention"
            )
        if len(layer_types) != config.get("num_hidden_layers"):
            raise CheckpointError(
                f"config.json: layer_types names {len(layer_types)} layers, "
                f"but num_hidden_layers is {config.get('num_hidden_layers')}"
            )
    if on_by_itself and "sliding_window" not in config:
        raise CheckpointError(
            "config.json: sliding_window is missing, and its default is not known; set it to null if that is "
            "what the model was trained with"
        )
    key = "sliding_window" if on_by_itself else "use_sliding_window"
    if (use is True or (on_by_itself and window is not None)) and not spans:
        raise CheckpointError(
            f"config.json: {key} is {config.get(key)!r:.80}, which is not supported: sliding_window "
            f"{window!r:.80} is shorter than max_position_embeddings {positions}; expected null, "
            "or a window as long as the context"
        )


def corrections(config: Config, head_size: int, window_alone: bool) -> dict[str, object]:
    """Return the keys of a config.json that an export changes so that transformers can read the file: nulls
    and names of types at which it fails, and windows that hide nothing.
    """
    found: dict[str, object] = {}
    for key in ("mlp_bias", "attention_bias", "use_sliding_window"):
        if key in config and config[key] is None:
            found[key] = False
    if "head_dim" in config and config["head_dim"] is None:
        found["head_dim"] = head_size
    types = config.get("layer_types")
    slides = isinstance(types, list) and "sliding_attention" in types
    if slides or config.get("use_sliding_window") is True or window_alone:
        found["sliding_window"] = None  # checked: it spans the context
    if config.get("use_sliding_window") is True:
        found["use_sliding_window"] = False
    if isinstance(types, list) and slides:
        found["layer_types"] = ["full_attention"] * len(types)
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None:
            found[key] = dtype(config)
    if "max_position_embeddings" not in config and "max_sequence_length" in config:
        found["max_position_embeddings"] = config["max_sequence_length"]
    return {key: value for key, value in found.items() if config.get(key, ...) != value}


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
    """Read the type of the parameters: `dtype` (transformers 5) or `torch_dtype` (older versions).

    "auto" means the tensors' own; "torch.bfloat16" is how some programs spell a type.
    """
    found = {str(config[key]) for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    found = {name.removeprefix("torch.") for name in found} - {"auto"}
    if len(found) > 1 or not found <= set(DTYPES):
        raise CheckpointError(f"config.json: dtype is {sorted(found)}, expected one of {', '.join(DTYPES)}")
    return found.pop() if found else None
