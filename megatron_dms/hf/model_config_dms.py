"""The configurations of exported models, each with a model type of its own.

A model type that transformers knows is built from transformers' own code wherever the code of the folder is
not asked for: without trust_remote_code=True, and in every other loader. An export would then run as its base
model, which evicts nothing and reads the borrowed channel. A model type that no library knows ends there with
an error.

Once loaded, a configuration is its base model's in name and model type, by which transformers finds the
tokenizer, and by which it checks that a model and its configuration belong together. (This file is copied
flat into every exported checkpoint.)
"""

from typing import Any

import transformers


def spell_rope(config: transformers.PretrainedConfig) -> None:
    """Give transformers 4 the RoPE settings that transformers 5 has saved under a name of its own.

    Without this, transformers 4 leaves `rope_parameters` alone, and rotates by its default base of 10000.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if not rope or hasattr(transformers.LlamaConfig(), "rope_parameters"):
        return
    config.rope_theta = rope.pop("rope_theta", config.rope_theta)
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    config.rope_scaling = None if rope["rope_type"] == "default" else rope


class _Config:
    """Read and write the model type of an export, such as qwen3_dms; it goes before the base class."""

    model_type: str

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json, and give it the base model's type."""
        config, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return {**config, "model_type": cls.model_type}, rest

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {**super().to_dict(), "model_type": f"{type(self).model_type}_dms"}  # type: ignore[misc]


class LlamaConfig(_Config, transformers.LlamaConfig):
    """transformers' LlamaConfig with `dms_*` keys."""


class MistralConfig(_Config, transformers.MistralConfig):
    """transformers' MistralConfig with `dms_*` keys."""


class Qwen2Config(_Config, transformers.Qwen2Config):
    """transformers' Qwen2Config with `dms_*` keys."""


class Qwen3Config(_Config, transformers.Qwen3Config):
    """transformers' Qwen3Config with `dms_*` keys."""
