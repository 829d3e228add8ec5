"""Rotary position embedding of a built model: frequencies and attention factor that no flag can express."""

from typing import TYPE_CHECKING

from megatron_dms.errors import CheckpointError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def set_attention_factor(model: "GPTModel", factor: float) -> None:
    """Set the factor on cosine and sine (yarn's) in every attention layer of this rank.

    Megatron's attention keeps such a factor under a private name; its flags cannot express every factor.

    Raises:
        CheckpointError: the model uses the fused kernel, which takes no factor, or Megatron has no place for
            a factor.
    """
    if factor == 1.0:
        return
    if model.config.apply_rope_fusion:
        raise CheckpointError("fused RoPE takes no attention factor, which yarn needs; use --no-rope-fusion")
    for layer in model.decoder.layers:
        if not hasattr(layer.self_attention, "_yarn_concentration_factor"):
            raise CheckpointError("this version of Megatron-Core has no place for yarn's attention factor")
        layer.self_attention._yarn_concentration_factor = factor
