"""The checks that refuse what a DMS model does not support, each before any cache has taken anything in.

Every function raises an exception whose message says what to do instead, or returns nothing.

Shapes: B sequences, T new tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import __version__

from .cache_dms import CACHE_NAME, DMSCache
from .configuration_dms import DMSSettings


def refuse_merging(settings: DMSSettings) -> None:
    """Refuse a model that was trained to merge pairs."""
    if settings.method == "merge":
        raise ValueError(
            "dms_method in config.json is 'merge': this model merges pairs (DMC, for comparison with DMS), "
            "which plain transformers does not run; load it with megatron_dms.inference.dmc_model.load_dmc"
        )


def refuse_sliding_layers(config) -> None:
    """Refuse a config with sliding-window layers."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"layer_types of the config contains {sorted(kinds - {'full_attention'})}, expected only "
            "full_attention: DMS models have no sliding-window layers (set use_sliding_window to false)"
        )


def max_positions(config) -> int:
    """The number of tokens in a sequence for which the model's RoPE is defined.

    By transformers' conventions, max_position_embeddings is the length before scaling for linear scaling, and
    may be for YaRN. Dynamic scaling has no limit, but it rotates each key by the length at its time, so
    chunks and steps would differ from a forward of the whole text: max_position_embeddings stays its limit.
    """
    # rope_parameters in transformers 5, rope_scaling in 4.57
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limit = config.max_position_embeddings
    if rope.get("rope_type", rope.get("type")) in ("linear", "yarn"):
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * rope["factor"]))
    return limit


def refuse_positions(limit: int, cache: DMSCache | None, T: int, real_BT: Tensor | None) -> None:
    """Refuse an input that ends beyond `limit` tokens, padding not counted."""
    new_B = torch.tensor([T]) if real_BT is None else real_BT.sum(dim=1).cpu()
    if cache is not None and cache.get_seq_length():
        new_B = cache.seen_B.cpu() + new_B
    longest = int(new_B.max())
    if longest > limit:
        raise ValueError(
            f"the input ends at token {longest}, the model has {limit} positions (max_position_embeddings "
            "and the RoPE scaling in its config.json); use a shorter one"
        )


def refuse_length(limit: int, columns: int, mask: Tensor | None) -> None:
    """Refuse a `generate` that may run into `limit`: at its start, not after hours.

    Args:
        columns: the most token columns that may be fed, padding included.
        mask: the attention mask of the prompt, [B, columns of the prompt], or None without padding.
    """
    if columns > limit and mask is not None:
        columns -= int((mask == 0).sum(dim=1).min())
    if columns > limit:
        raise ValueError(
            f"prompt and new tokens may come to {columns + 1} tokens (max_length, or max_new_tokens beyond "
            f"the prompt), the model has {limit} positions; ask for fewer new tokens"
        )


def refuse_other_autocast(cache: DMSCache, device_type: str) -> None:
    """Refuse a forward that would bring keys and values of another type, before its tokens count."""
    now = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if cache.columns and cache.autocast != now:
        raise ValueError(
            f"this DMS cache was begun with autocast to {cache.autocast}, this forward has {now} (None: no "
            "autocast): one cache, one type; keep autocast as it was, or start a new cache"
        )
    cache.autocast = now


def refuse_cache_in_checkpointing() -> None:
    """Refuse a cache with gradient checkpointing: at the next forward the layers would be without it.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "gradient checkpointing is on and the model is in train mode: transformers then takes the cache away "
        "from the layers; call model.eval(), or pass use_cache=False"
    )


def refuse_continuation(cache: DMSCache, generation_config) -> None:
    """Refuse a `generate` on a cache that does not hold the beginning of the text, row by row."""
    if cache.get_seq_length() == 0:
        return
    if not generation_config.use_cache:
        raise ValueError(f"use_cache=False with a cache as {CACHE_NAME}; give one or the other")
    if cache.follows_beams:
        raise ValueError(
            "this DMS cache holds the beams that a beam search was following, not the sequences it returned; "
            "continue with a new cache and the whole text"
        )
    meter, seen_B = cache.meter, cache.seen_B
    if meter.rows == len(seen_B) and not torch.equal(meter.seen_B.to(seen_B.device), seen_B):
        raise ValueError(
            "a sequence of this DMS cache had ended before the others of its batch, and padding was fed to "
            "it: continue such a batch with a new cache and the whole text"
        )
    prompt = generation_config._dms_prompt_columns
    if prompt is not None and prompt <= cache.get_seq_length():
        raise ValueError(
            f"the text has {prompt} tokens, the DMS cache has had {cache.get_seq_length()}: give the whole "
            "text, beyond what the cache has had, or reset() the cache"
        )


def refuse_outputs(config, inputs: dict[str, Any]) -> None:
    """Refuse outputs and back-ends that DMS attention does not provide."""
    attentions = inputs.get("output_attentions")
    if config.output_attentions if attentions is None else attentions:
        raise ValueError("output_attentions is not supported by DMS models: the weights are never formed")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation is {config._attn_implementation!r}, expected 'sdpa': DMS models bring "
            "their own attention"
        )


def refuse_foreign_cache(model, cache: DMSCache) -> None:
    """Refuse a cache that was made for a model (a DMSForCausalLM) of other sizes."""
    settings, layers = model.dms_settings, model.model.layers
    names = "layers, window, lag"
    found: tuple[int, ...] = (len(cache.layers), cache.window, cache.lag)
    expected: tuple[int, ...] = (len(layers), settings.window, settings.lag)
    if cache.get_seq_length():
        names += ", KV heads, head size"
        found += (cache.layers[0].groups, cache.layers[0].pool.keys_PSD.shape[-1])
        expected += (model.config.num_key_value_heads, layers[0].self_attn.head_dim)
    if found != expected:
        raise ValueError(f"this DMS cache has ({names}) = {found}, the model needs {expected}")


def refuse_hidden_past(mask: Tensor, past: int, seen_B: Tensor) -> None:
    """Refuse a mask that declares tokens padding which the cache has taken in as real tokens."""
    if not torch.equal(mask[:, :past].sum(dim=1).to(seen_B), seen_B):
        raise ValueError(
            "attention_mask hides tokens that the cache has taken in, such as those fed to a sequence that "
            "had ended before the others of its batch; they may have evicted pairs already. Continue such a "
            "batch with a new cache and the whole text"
        )


def refuse_packed(position_ids: Tensor | None, real_BT: Tensor | None, T: int) -> None:
    """Refuse several texts packed in one row: they would need masks between them, which transformers infers
    from the position ids."""
    if position_ids is None or T == 1:
        return
    jumps_BT = position_ids.diff(dim=-1) != 1
    if real_BT is not None:
        jumps_BT = jumps_BT & real_BT[:, 1:] & real_BT[:, :-1]
    if bool(jumps_BT.any()):
        raise ValueError(
            "position_ids do not count up by 1: DMS models do not support several packed texts in one row; "
            "give each its own row, with padding"
        )


def refuse_frozen_positions(position_ids: Tensor, mask: Tensor | None) -> None:
    """Refuse position_ids of `generate` that do not count the prompt's real tokens from 0.

    transformers 4 does not count them on: it would give each new token the position of the prompt's last one.
    Positions that count real tokens are what the model finds without them.

    Args:
        position_ids: [B or 1, T].
        mask: the attention mask of the prompt, [B, at least T], or None without padding.
    """
    T = position_ids.shape[-1]
    real_BT = torch.ones_like(position_ids) if mask is None else mask
    counted_BT = (real_BT.long().cumsum(-1) - 1)[:, -T:]
    differs_BT = (position_ids != counted_BT) & (real_BT[:, -T:] != 0)
    if bool(differs_BT.any()):
        raise ValueError(
            "position_ids do not count the tokens of the prompt from 0: this release of transformers gives "
            "each new token the position of the prompt's last one; leave position_ids out, or use "
            "transformers 5"
        )


def refuse_generation_modes(generation_config, mode: str | None) -> None:
    """Refuse generation modes that bypass the cache or roll it back."""
    if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation {generation_config.cache_implementation!r} is not supported: DMS models "
            "bring their own cache; leave it unset"
        )
    if mode == "assisted_generation" or getattr(generation_config, "is_assistant", False):
        raise ValueError(
            "assisted generation and prompt lookup are not supported by DMS models: a rejected token may "
            "already have evicted pairs; generate with the model alone"
        )


def refuse_chunks_of_padding(generation_config, mask: Tensor | None) -> None:
    """Refuse chunks of a padded prompt in transformers 4, which counts padding in the positions of chunks but
    not in the positions of steps."""
    in_chunks = getattr(generation_config, "prefill_chunk_size", None) is not None
    if in_chunks and int(__version__.split(".")[0]) < 5 and mask is not None and not bool(mask.all()):
        raise ValueError(
            f"prefill_chunk_size with a padded batch: transformers {__version__} would give its tokens wrong "
            "positions; use transformers 5, prompts of one length, or no prefill_chunk_size"
        )
