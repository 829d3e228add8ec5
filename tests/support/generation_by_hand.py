"""Generation without `generate`, padding, and forwards in chunks."""

import torch

PROMPT, NEW = 13, 17


def greedy_by_hand(model, ids_BT, steps=NEW):
    """The same without generate and without a cache."""
    for _ in range(steps):
        best = model(ids_BT, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids_BT = torch.cat([ids_BT, best], dim=1)
    return ids_BT


def left_padded(*prompts):
    """input_ids and attention_mask of prompts [1, T_i], padded with 0 on the left."""
    width = max(p.shape[1] for p in prompts)
    pad = [torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts]
    mask = [torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts]
    return {"input_ids": torch.cat(pad), "attention_mask": torch.cat(mask)}


def feed(model, cache, ids_BT, sizes, **inputs):
    """Logits [B, T, vocab] of the tokens fed in chunks of the given sizes (the last one as often as
    needed)."""
    logits, start = [], 0
    sizes = list(sizes)
    while start < ids_BT.shape[1]:
        stop = start + (sizes.pop(0) if len(sizes) > 1 else sizes[0])
        logits.append(model(ids_BT[:, start:stop], past_key_values=cache, use_cache=True, **inputs).logits)
        start = stop
    return torch.cat(logits, dim=1)
