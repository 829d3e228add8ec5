"""Models of real shapes with random weights, and caches that are filled without computing a prompt.

Weights, pairs and decisions have no meaning; times and bytes do.

Shapes: B sequences, G KV heads, T tokens of context, D head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache

from megatron_dms.hf import MODEL_CLASSES, config_entries, modeling_dms
from megatron_dms.hf.cache_dms import DMSCache
from megatron_dms.hf.configuration_dms import DMSSettings
from megatron_dms.planning.models import QWEN3_SMALL, TOY, ModelSize, preset
from megatron_dms.upstream.transformers_models import model_from_config


def _config(size: ModelSize) -> PretrainedConfig:
    """Return the configuration of a model with these sizes."""
    entries: dict[str, Any] = {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.groups,
        "head_dim": size.head_size,
        "tie_word_embeddings": size.tied,
        "max_position_embeddings": size.positions,
    }
    return (Qwen3Config if size.qk_norm else LlamaConfig)(**entries)


SHAPES = {size.name: size for size in (preset("llama-3.2-1b"), QWEN3_SMALL, TOY)}
WINDOW, LAG = 256, 1
_NEVER = 1e6
"""Offset under which no new token is ever evicted, so that the filled cache keeps its ratio."""


DMSModel = modeling_dms.LlamaForCausalLMDMS | modeling_dms.Qwen3ForCausalLMDMS


class Pair(NamedTuple):
    """One model as a dense and as a DMS model, which share one copy of the weights."""

    dense: PreTrainedModel
    dms: DMSModel
    shape: ModelSize

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(parameter.nbytes for parameter in self.dense.parameters())


def check_shape(shape: str) -> None:
    """Raise ValueError if no shape has this name."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")


@torch.no_grad()
def make_models(shape: str, cr: float, dtype: torch.dtype, device: torch.device) -> Pair:
    """Make transformers' model with SDPA, and the exported DMS model.

    `cr` is the ratio in the config.json of the DMS model; it has no effect on what the model does.
    """
    size = SHAPES[shape]
    config = _config(size)
    dense = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    _randomize(dense.to(device))
    settings = DMSSettings(window=WINDOW, lag=LAG, alpha_scale=1.0, alpha_offset=_NEVER, target_cr=cr)
    entries = config_entries(config.model_type, settings)
    dms_config = type(config).from_dict({**config.to_dict(), **entries})
    dms = model_from_config(getattr(modeling_dms, MODEL_CLASSES[config.model_type]), dms_config, dtype)
    dms.load_state_dict(dense.state_dict(), assign=True)
    return Pair(dense.eval(), dms.to(device).eval(), size)


def _randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)


def fill(caches: Sequence[Cache], models: Pair, B: int, T: int, cr: float) -> None:
    """Put the same random pairs into each of these empty caches, layer by layer.

    A DynamicCache keeps all pairs. Each KV head of a DMS cache keeps the window, and so many of the older
    pairs, drawn at random, that the head holds T / cr pairs in total.
    """
    G, D = models.shape.groups, models.shape.head_size
    device, dtype = models.dense.device, models.dense.dtype
    new = {id(x): x.place(B, T, None, device) for x in caches if isinstance(x, DMSCache)}
    share = max(0.0, (T / cr - WINDOW - 1) / (T - WINDOW - 1))
    for layer in range(models.shape.layers):
        k, v = (torch.randn(B, G, T, D, device=device).to(dtype) for _ in range(2))
        for cache in caches:
            if isinstance(cache, DMSCache):
                drawn = torch.rand(B, G, T, device=device)
                cache.layers[layer].extend(k, v, (drawn >= share) & (cr > 1), new[id(cache)])
            else:
                cache.update(k, v, layer)
