"""Models of real shapes with random weights, and caches that are full without a prompt having been computed.

Weights, pairs and decisions have no meaning; times and bytes do.

Shapes: B sequences, G KV heads, T tokens of context, D head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.cache_utils import Cache, DynamicCache

from megatron_dms.hf import MODEL_CLASSES, config_entries, modeling_dms
from megatron_dms.hf.configuration_dms import DMSSettings
from megatron_dms.upstream.transformers_models import model_from_config


class Shape(NamedTuple):
    """Sizes of a model, in config.json's terms."""

    config_class: type[PretrainedConfig]
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    head_size: int

    def config(self) -> PretrainedConfig:
        return self.config_class(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_size,
            tie_word_embeddings=True,
            max_position_embeddings=131072,
        )


SHAPES = {
    "llama-3.2-1b": Shape(LlamaConfig, 128256, 2048, 8192, 16, 32, 8, 64),
    "qwen3-0.6b": Shape(Qwen3Config, 151936, 1024, 3072, 28, 16, 8, 128),
    "tiny": Shape(LlamaConfig, 131, 64, 96, 2, 4, 2, 16),
}
WINDOW, LAG = 256, 1
_NEVER = 1e6
"""Offset under which no new token is ever evicted: the ratio of the filled cache stays as it is."""


class Pair(NamedTuple):
    """One model twice, with one copy of the weights."""

    dense: nn.Module
    dms: nn.Module

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.dense.parameters())


def check_shape(shape: str) -> None:
    """Raises ValueError for an unknown name."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")


@torch.no_grad()
def make_models(shape: str, cr: float, dtype: torch.dtype, device: torch.device) -> Pair:
    """transformers' model with SDPA, and the exported one; `cr` is what the latter's config.json says, and
    without effect on what it does."""
    config = SHAPES[shape].config()
    dense = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    _randomize(dense.to(device))
    settings = DMSSettings(window=WINDOW, lag=LAG, alpha_scale=1.0, alpha_offset=_NEVER, target_cr=cr)
    entries = config_entries(config.model_type, settings)
    dms_config = type(config).from_dict({**config.to_dict(), **entries})
    dms = model_from_config(getattr(modeling_dms, MODEL_CLASSES[config.model_type]), dms_config, dtype)
    dms.load_state_dict(dense.state_dict(), assign=True)
    return Pair(dense.eval(), dms.to(device).eval())


def _randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)


def fill(caches: Sequence[Cache], model: nn.Module, B: int, T: int, cr: float) -> None:
    """Put the same random pairs into each of these empty caches, layer by layer.

    A DynamicCache keeps all of them; of a DMS cache each KV head keeps as many as the ratio says: the window,
    and of the older ones so many, drawn, that a head holds T / cr in all.
    """
    G, D = model.config.num_key_value_heads, model.config.head_dim
    place = {"device": model.device}
    new = {id(x): x.place(B, T, None, model.device) for x in caches if not isinstance(x, DynamicCache)}
    share = max(0.0, (T / cr - WINDOW - 1) / (T - WINDOW - 1))
    for layer in range(model.config.num_hidden_layers):
        k, v = (torch.randn(B, G, T, D, **place).to(model.dtype) for _ in range(2))
        for cache in caches:
            if isinstance(cache, DynamicCache):
                cache.update(k, v, layer)
            else:
                drawn = torch.rand(B, G, T, **place)
                cache.layers[layer].extend(k, v, (drawn >= share) & (cr > 1), new[id(cache)])
