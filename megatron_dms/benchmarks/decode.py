"""Decode speed of the paged DMS cache against transformers' dense one, in one process.

Models of real shapes with random weights; caches are filled with random pairs, of which each KV head keeps as
many as the compression ratio says, so no prompt has to be computed. Weights and decisions have no meaning,
times and bytes do.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.cache_utils import DynamicCache

from megatron_dms.hf import MODEL_CLASSES, config_entries, modeling_dms


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


@dataclass(frozen=True)
class Decoded:
    """One context length. Times in seconds, medians of the steps; bytes of keys and values."""

    context: int
    batch: int
    cr: float
    dense_step: float
    dms_step: float
    dense_attention: float
    dms_attention: float
    weight_bytes: int
    dense_bytes: int
    live_bytes: int
    allocated_bytes: int

    @property
    def speedup(self) -> float:
        """Of a whole decode step."""
        return self.dense_step / self.dms_step

    @property
    def allowed_speedup(self) -> float:
        """What the bytes that a step reads allow."""
        return (self.weight_bytes + self.dense_bytes) / (self.weight_bytes + self.live_bytes)

    @property
    def attention_speedup(self) -> float:
        return self.dense_attention / self.dms_attention


@torch.no_grad()
def measure(
    shape: str, contexts: list[int], batch: int, cr: float, steps: int, dtype: torch.dtype,
    say: Callable[[str], None],
) -> list[Decoded]:  # fmt: skip
    """Decode `steps` tokens on each context (in tokens), dense and DMS in turn, after two that warm up.

    Raises:
        ValueError: a number out of range, or an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")
    if batch < 1 or steps < 1 or cr < 1 or min(contexts) <= WINDOW:
        raise ValueError(f"expected batch and steps >= 1, CR >= 1 and contexts > {WINDOW} tokens")
    config = SHAPES[shape].config()
    say(f"making {shape} with random weights, {dtype} ...")
    dense = _random(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa"))
    entries = config_entries(config.model_type, "query_channel", "head", WINDOW, LAG, 1.0, _NEVER, 0.1, cr)
    dms_config = type(config).from_dict({**config.to_dict(), **entries})
    dms = getattr(modeling_dms, MODEL_CLASSES[config.model_type])._from_config(dms_config, dtype=dtype).eval()
    dms.load_state_dict(dense.state_dict(), assign=True)  # one copy of the weights for both
    found = []
    for context in contexts:
        say(f"context {context}, batch {batch}, CR {cr:g} ...")
        found.append(_measure_context(dense.eval(), dms, context, batch, cr, steps))
    return found


def _random(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    return model


def _measure_context(
    dense: nn.Module, dms: nn.Module, context: int, batch: int, cr: float, steps: int
) -> Decoded:
    config, dtype = dense.config, dense.dtype
    G, D = config.num_key_value_heads, config.head_dim
    tokens = torch.randint(config.vocab_size, (batch, steps + 2))

    dense_cache, dms_cache = DynamicCache(), dms.make_cache()
    new = dms_cache.place(batch, context, None, torch.device("cpu"))
    for layer in range(config.num_hidden_layers):
        k, v = (torch.randn(batch, G, context, D).to(dtype) for _ in range(2))
        dense_cache.update(k, v, layer)
        # Of the pairs that have left the window so many stay that a head holds context / cr in all.
        older = context - WINDOW - 1
        share = max(0.0, (context / cr - WINDOW - 1) / older)
        evict = torch.rand(batch, G, context) >= share if cr > 1 else torch.zeros(batch, G, context).bool()
        dms_cache.layers[layer].extend(k, v, evict, new)
    first = dms_cache.layers[0]
    pair_bytes = 2 * D * dense.dtype.itemsize
    live = sum(int(layer.held_BG.sum()) for layer in dms_cache.layers) * pair_bytes
    allocated = sum(layer.kv_bytes for layer in dms_cache.layers)
    dense_bytes = config.num_hidden_layers * batch * G * context * pair_bytes
    q = torch.randn(batch, config.num_attention_heads, 1, D).to(dtype)
    k, v = dense_cache.layers[0].keys, dense_cache.layers[0].values
    scale = D**-0.5

    def dense_attention() -> Tensor:
        # as transformers: keys and values of a group are shared by SDPA
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    attention = [
        (_seconds(dense_attention), _seconds(partial(first.attend, q, scale))) for _ in range(steps + 2)
    ]
    step_times = [
        (
            _seconds(partial(dense, token, past_key_values=dense_cache)),
            _seconds(partial(dms, token, past_key_values=dms_cache)),
        )
        for token in tokens.split(1, dim=1)
    ]
    return Decoded(
        context,
        batch,
        cr,
        *(median(column) for column in zip(*step_times[2:], strict=True)),
        *(median(column) for column in zip(*attention[2:], strict=True)),
        sum(parameter.nbytes for parameter in dense.parameters()),
        dense_bytes,
        live,
        allocated,
    )


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
