"""Merging of keys and values as the recurrence of its definition."""

import torch
from torch import Tensor


def merge_by_loop(k: Tensor, v: Tensor, alpha: Tensor, log_importance: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the recurrence of the paper token by token; returns the merged keys and values [B, G, T, D]."""
    keys, values, weight = [k[:, :, 0]], [v[:, :, 0]], log_importance[:, :, 0].exp()[..., None]
    for t in range(1, k.shape[2]):
        old, new = alpha[:, :, t, None] * weight, log_importance[:, :, t, None].exp()
        weight = old + new
        keys.append((old * keys[-1] + new * k[:, :, t]) / weight)
        values.append((old * values[-1] + new * v[:, :, t]) / weight)
    return torch.stack(keys, dim=2), torch.stack(values, dim=2)
