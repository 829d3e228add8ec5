"""The outputs of a model on a set of prompts, and how far the outputs of two models agree.

Shapes: L layers, B prompts, G KV heads, T tokens, V vocabulary.

A hard eviction decision is 1[z > 0]. Where z is 0 up to rounding, two correct implementations may decide
differently, and then their logits differ, rightly, from the first query on that no longer finds the pair. So
decisions are compared one by one, and logits at the positions before that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dms.ops.eviction import shift

LOGIT_TOLERANCE = 1e-4
"""Largest difference of fp32 logits that counts as equal; the raw value of an eviction decision (what
alpha_scale multiplies) gets the same.
"""


@dataclass(frozen=True)
class Outputs:
    """The outputs of one model on one set of prompts. The last two are None without DMS."""

    logits_BTV: Tensor
    evict_LBGT: Tensor | None = None
    """bool: the decision that each token carries."""
    near_zero_LBGT: Tensor | None = None
    """bool: z is 0 within the tolerance of its raw value; known of the reference only."""


@dataclass(frozen=True)
class Agreement:
    """How two models' outputs compare.

    The last three are None without DMS. decisions_differ: single decisions that are not the same. evicted:
    share of the pairs before the last position compared that it can no longer read, over layers, KV heads
    and prompts. compared: share of the positions at which logits are compared.
    """

    max_abs_logit_diff: float
    argmax_agreement: float
    passed: bool
    decisions_differ: int | None = None
    evicted: float | None = None
    compared: float | None = None


def agreement(reference: Outputs, found: Outputs, window: int = 0, lag: int = 0) -> Agreement:
    """Compare logits, and for a DMS model (window and lag in tokens) decisions."""
    theirs_LBGT, ours_LBGT, near_zero_LBGT = reference.evict_LBGT, found.evict_LBGT, reference.near_zero_LBGT
    if theirs_LBGT is None:
        diff, argmax = _compare_logits(reference, found)
        return Agreement(diff, argmax, diff <= LOGIT_TOLERANCE)
    if ours_LBGT is None or near_zero_LBGT is None:
        raise ValueError("one model made eviction decisions and the other made none")
    tokens = torch.arange(reference.logits_BTV.shape[1])
    differ_LBGT = theirs_LBGT ^ ours_LBGT
    differ_LBGT[..., :lag] = False  # carried for no pair
    # Token t decides about pair t - lag, which the query window + 1 later is the first to miss.
    first_effect_T = tokens - lag + window + 1
    differ_BT = differ_LBGT.any(dim=2).any(dim=0)
    compared_B = torch.where(differ_BT, first_effect_T, len(tokens)).amin(dim=1).clamp(max=len(tokens))
    compared_BT = tokens < compared_B[:, None]
    # What differs later is a consequence; what differs before must be a matter of rounding.
    unexplained = differ_LBGT & ~near_zero_LBGT & compared_BT[None, :, None]
    diff, argmax = _compare_logits(reference, found, compared_BT)
    return Agreement(
        max_abs_logit_diff=diff,
        argmax_agreement=argmax,
        passed=diff <= LOGIT_TOLERANCE and not bool(unexplained.any()),
        decisions_differ=int(differ_LBGT.sum()),
        evicted=_evicted(ours_LBGT, compared_B - 1, window, lag),
        compared=compared_BT.double().mean().item(),
    )


def _compare_logits(
    reference: Outputs, found: Outputs, compared_BT: Tensor | None = None
) -> tuple[float, float]:
    """Return the largest absolute difference and the share of positions where the likeliest token agrees."""
    diffs, same = [], []
    for prompt in range(len(reference.logits_BTV)):  # one by one: a vocabulary's logits are large
        rows = slice(None) if compared_BT is None else compared_BT[prompt]
        ours, theirs = found.logits_BTV[prompt][rows], reference.logits_BTV[prompt][rows]
        diffs.append((ours - theirs).abs().max())
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    return torch.stack(diffs).max().item(), torch.cat(same).float().mean().item()


def _evicted(evict_LBGT: Tensor, last_B: Tensor, window: int, lag: int) -> float:
    pairs = torch.arange(evict_LBGT.shape[-1])
    left_window_BT = last_B[:, None] - pairs > window
    gone = shift(evict_LBGT.float(), lag) * left_window_BT[None, :, None]
    layers, _, groups, _ = evict_LBGT.shape
    return gone.sum().item() / ((last_B + 1).sum().item() * layers * groups)
