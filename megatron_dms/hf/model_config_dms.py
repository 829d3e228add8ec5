"""The configurations of exported models, each with a model type of its own.

A model type that transformers knows is built from transformers' own code wherever the code of the folder is
not asked for: without trust_remote_code=True, and in every other loader. An export would then run as its base
model, which evicts nothing and reads the borrowed channel. A model type that no library knows ends there with
an error.

Each class keeps the name of its base class, by which transformers finds the tokenizer, and by which it checks
that a model and its configuration belong together. (This file is copied flat into every exported checkpoint.)
"""

import transformers


def spell_rope(config: transformers.PretrainedConfig) -> None:
    """Give transformers 4 the RoPE settings that transformers 5 has saved under a name of its own.

    Without this, transformers 4 leaves `rope_parameters` alone, and rotates by its default base of 10000.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if not rope or hasattr(transformers.LlamaConfig(), "rope_parameters"):
        return
    config.rope_theta = rope.pop("rope_theta", 10000.0)
    config.rope_scaling = None if rope.get("rope_type", "default") == "default" else rope


class LlamaConfig(transformers.LlamaConfig):
    """transformers' LlamaConfig with `dms_*` keys."""

    model_type = "llama_dms"


class MistralConfig(transformers.MistralConfig):
    """transformers' MistralConfig with `dms_*` keys."""

    model_type = "mistral_dms"


class Qwen2Config(transformers.Qwen2Config):
    """transformers' Qwen2Config with `dms_*` keys."""

    model_type = "qwen2_dms"


class Qwen3Config(transformers.Qwen3Config):
    """transformers' Qwen3Config with `dms_*` keys."""

    model_type = "qwen3_dms"
