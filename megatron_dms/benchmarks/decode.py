"""Decode speed of the paged DMS cache against transformers' dense one, in one process, on the CPU.

Of models with random weights and caches filled without a prompt: see filled.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from megatron_dms.benchmarks.measuring import wall_seconds
from megatron_dms.benchmarks.synthetic_models import WINDOW, Pair, check_shape, fill, make_models


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
    check_shape(shape)
    if batch < 1 or steps < 1 or cr < 1 or min(contexts) <= WINDOW:
        raise ValueError(f"expected batch and steps >= 1, CR >= 1 and contexts > {WINDOW} tokens")
    say(f"making {shape} with random weights, {dtype} ...")
    models = make_models(shape, cr, dtype, torch.device("cpu"))
    found = []
    for context in contexts:
        say(f"context {context}, batch {batch}, CR {cr:g} ...")
        found.append(_measure_context(models, context, batch, cr, steps))
    return found


def _measure_context(models: Pair, context: int, batch: int, cr: float, steps: int) -> Decoded:
    dense, dms = models.dense, models.dms
    config, dtype = dense.config, dense.dtype
    G, D = config.num_key_value_heads, config.head_dim
    tokens = torch.randint(config.vocab_size, (batch, steps + 2))
    dense_cache, dms_cache = DynamicCache(), dms.make_cache()
    fill([dense_cache, dms_cache], dms, batch, context, cr)
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
        (wall_seconds(dense_attention), wall_seconds(partial(first.attend, q, scale)))
        for _ in range(steps + 2)
    ]
    step_times = [
        (
            wall_seconds(partial(dense, token, past_key_values=dense_cache)),
            wall_seconds(partial(dms, token, past_key_values=dms_cache)),
        )
        for token in tokens.split(1, dim=1)
    ]
    return Decoded(
        context,
        batch,
        cr,
        *(median(column) for column in zip(*step_times[2:], strict=True)),
        *(median(column) for column in zip(*attention[2:], strict=True)),
        models.weight_bytes,
        dense_bytes,
        live,
        allocated,
    )
