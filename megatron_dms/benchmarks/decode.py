"""Decode speed of the paged DMS cache against transformers' dense cache, in one process, on the CPU.

Models have random weights, and caches are filled without a prompt (synthetic_models.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from megatron_dms.benchmarks.measuring import wall_seconds
from megatron_dms.benchmarks.synthetic_models import WINDOW, Pair, check_shape, fill, make_models
from megatron_dms.hf.cache_dms import CACHE_NAME


@dataclass(frozen=True)
class Decoded:
    """One context length. Times are medians over steps, in seconds; bytes are those of keys and values."""

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
        """Speed of a whole decode step, as a multiple of the dense one."""
        return self.dense_step / self.dms_step

    @property
    def allowed_speedup(self) -> float:
        """The speedup that the numbers of bytes which a step reads allow."""
        return (self.weight_bytes + self.dense_bytes) / (self.weight_bytes + self.live_bytes)

    @property
    def attention_speedup(self) -> float:
        """Speed of the attention of one layer, as a multiple of the dense one."""
        return self.dense_attention / self.dms_attention


@torch.no_grad()
def measure(
    shape: str, contexts: list[int], batch: int, cr: float, steps: int, dtype: torch.dtype,
    say: Callable[[str], None],
) -> list[Decoded]:  # fmt: skip
    """Decode `steps` tokens at each context (in tokens) after two warm-up tokens; dense and DMS take turns.

    Raises:
        ValueError: a number is out of range, or the shape is unknown.
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
    dense, dms, shape = models.dense, models.dms, models.shape
    G, D, dtype = shape.groups, shape.head_size, models.dense.dtype
    tokens = torch.randint(shape.vocab, (batch, steps + 2))
    dense_cache, dms_cache = DynamicCache(), dms.make_cache()
    fill([dense_cache, dms_cache], models, batch, context, cr)
    first = dms_cache.layers[0]
    pair_bytes = 2 * D * dtype.itemsize
    live = sum(int(layer.held_BG.sum()) for layer in dms_cache.layers) * pair_bytes
    allocated = sum(layer.kv_bytes for layer in dms_cache.layers)
    dense_bytes = shape.layers * batch * G * context * pair_bytes
    q = torch.randn(batch, shape.heads, 1, D).to(dtype)
    k, v = _pairs(dense_cache)
    scale = D**-0.5

    def dense_attention() -> Tensor:
        # as in transformers: SDPA shares the keys and values of a group
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    attention = [
        (wall_seconds(dense_attention), wall_seconds(partial(first.attend, q, scale)))
        for _ in range(steps + 2)
    ]
    step_times = [
        (
            wall_seconds(partial(dense, token, **{CACHE_NAME: dense_cache})),
            wall_seconds(partial(dms, token, **{CACHE_NAME: dms_cache})),
        )
        for token in tokens.split(1, dim=1)
    ]
    dense_step, dms_step = _medians(step_times[2:])
    dense_attended, dms_attended = _medians(attention[2:])
    return Decoded(
        context,
        batch,
        cr,
        dense_step,
        dms_step,
        dense_attended,
        dms_attended,
        models.weight_bytes,
        dense_bytes,
        live,
        allocated,
    )


def _medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the medians of the dense times and of the DMS times."""
    dense, dms = zip(*times, strict=True)
    return median(dense), median(dms)


def _pairs(cache: DynamicCache) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of the first layer, each [B, G, T, D]."""
    layer = cache.layers[0]
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        raise TypeError(f"the first layer of the dense cache is {layer!r}, expected a filled DynamicLayer")
    return layer.keys, layer.values
