"""Generation without `generate`, padding, and forwards in chunks."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

PROMPT, NEW = 13, 17


def greedy_by_hand(model: PreTrainedModel, ids_BT: Tensor, steps: int = NEW) -> Tensor:
    """Append the likeliest token `steps` times, without `generate` and without a cache."""
    for _ in range(steps):
        best = model(ids_BT, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids_BT = torch.cat([ids_BT, best], dim=1)
    return ids_BT


def left_padded(*prompts: Tensor) -> dict[str, Tensor]:
    """Return input_ids and attention_mask of prompts [1, T_i], padded with 0 on the left."""
    width = max(p.shape[1] for p in prompts)
    pad = [torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts]
    mask = [torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts]
    return {"input_ids": torch.cat(pad), "attention_mask": torch.cat(mask)}


def feed(
    model: PreTrainedModel, cache: Cache, ids_BT: Tensor, sizes: Iterable[int], **inputs: object
) -> Tensor:
    """Feed the tokens in chunks of the given sizes, the last size as often as needed.

    Returns the logits [B, T, vocab].
    """
    logits, start = [], 0
    sizes = list(sizes)
    while start < ids_BT.shape[1]:
        stop = start + (sizes.pop(0) if len(sizes) > 1 else sizes[0])
        logits.append(model(ids_BT[:, start:stop], past_key_values=cache, use_cache=True, **inputs).logits)
        start = stop
    return torch.cat(logits, dim=1)
