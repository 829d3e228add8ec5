"""Several sequences from one prompt: it is computed once, and the cache is forked when they part.

`generate` repeats each prompt n = max(num_beams, num_return_sequences) times, row after row. Until the first
step with one token, the model's pre-forward hook takes every n-th row only, and the hook after it repeats the
hidden states, so that logits and sampling see the whole batch. `DMSCache.copies` is n for so long.

Shapes: B rows of the caller's batch, T new tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .cache_dms import DMSCache

ROW_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


def first_of_equal_rows(inputs: dict[str, Any], cache: DMSCache, B: int, T: int) -> int:
    """Leave one row of each `cache.copies` in `inputs`; or fork the cache, where rows differ or T is 1.

    Returns:
        How many rows each one left stands for.
    """
    n = cache.copies
    of_rows = {
        name: value
        for name in ROW_INPUTS
        if isinstance(value := inputs.get(name), Tensor) and value.shape[0] == B
    }
    counted_apart = cache.meter.rows is not None and cache.meter.rows != len(cache.seen_B)
    as_tuple = inputs.get("return_dict") is False  # has no names for what would be repeated
    if (
        T == 1
        or counted_apart
        or as_tuple
        or B % n
        or not all(_equal_in_groups(x, n) for x in of_rows.values())
    ):
        cache.fork()
        return 1
    inputs |= {name: value[::n] for name, value in of_rows.items()}
    return n


def repeat_rows(model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the base model: give the caller as many rows as it passed."""
    n = kwargs["dms_step"].copies
    if n > 1:
        for name in ("last_hidden_state", "hidden_states"):
            if output.get(name) is not None:
                output[name] = _repeated(output[name], n)
    return output


def _repeated(states: Tensor | tuple[Tensor, ...], n: int) -> Tensor | tuple[Tensor, ...]:
    if isinstance(states, tuple):
        return tuple(_repeated(part, n) for part in states)
    return states.repeat_interleave(n, dim=0)


def _equal_in_groups(rows: Tensor, n: int) -> bool:
    groups = rows.unflatten(0, (-1, n))
    return torch.equal(groups, groups[:, :1].expand_as(groups))
