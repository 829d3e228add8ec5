"""Several sequences from one prompt: the prompt is computed once, and the cache is forked when they part.

`generate` repeats each prompt n = max(num_beams, num_return_sequences) times, row after row. Until the first
step with one token, the model's pre-forward hook passes on only every n-th row. Its post-forward hook repeats
the hidden states, so that logits and sampling see the whole batch. Until then, `DMSCache.copies` is n.

Shapes: B rows of the caller's batch, T new tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .cache_dms import DMSCache

ROW_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


def first_of_equal_rows(inputs: dict[str, Any], cache: DMSCache, B: int, T: int) -> int:
    """Keep one row in `inputs` for each `cache.copies` rows, or fork the cache if rows differ or T is 1.

    Returns:
        The number of rows that each row in `inputs` now stands for.
    """
    n = cache.copies
    of_rows = {
        name: value
        for name in ROW_INPUTS
        if isinstance(value := inputs.get(name), Tensor) and value.shape[0] == B
    }
    counted_apart = cache.meter.rows not in (0, len(cache.seen_B))
    as_tuple = inputs.get("return_dict") is False  # a tuple does not name the hidden states to repeat
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
    """Forward hook of the base model: return as many rows as the caller passed."""
    n = kwargs["dms_step"].copies
    if n > 1:
        for name in ("last_hidden_state", "hidden_states"):
            if output.get(name) is not None:
                output[name] = _repeated(output[name], n)
    return output


def _repeated(states: Tensor | tuple[Tensor, ...], n: int) -> Tensor | tuple[Tensor, ...]:
    if isinstance(states, tuple):
        return tuple(part.repeat_interleave(n, dim=0) for part in states)
    return states.repeat_interleave(n, dim=0)


def _equal_in_groups(rows: Tensor, n: int) -> bool:
    groups = rows.unflatten(0, (-1, n))
    return torch.equal(groups, groups[:, :1].expand_as(groups))
