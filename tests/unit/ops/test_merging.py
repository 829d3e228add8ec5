"""Merging instead of evicting (DMC): pooling computed by hand, against a loop, and in attention.

Everything of the operator in fp64, tolerance 1e-12 of values of order 1.
"""

import math

import pytest
import torch
from torch import Tensor

from megatron_dms.ops.attention import dms_attention
from megatron_dms.ops.eviction import shift
from megatron_dms.ops.merging import merge_pairs
from tests.support.merging_by_loop import merge_by_loop

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def column(*values: float) -> Tensor:
    """One sample, one head, D = 1."""
    return torch.tensor(values, dtype=torch.float64)[None, None, :, None]


def per_token(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, None]


def pairs(T: int, hard: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """k, v, alpha, log importance of 2 samples and 3 heads; values' size is not the keys'."""
    generator = torch.Generator().manual_seed(5)
    alpha = torch.rand(2, 3, T, generator=generator, dtype=dtype)
    alpha = (alpha > 0.4).to(dtype) if hard else alpha.clamp(0.02, 0.98)
    k, v = (torch.randn(2, 3, T, size, generator=generator, dtype=dtype) for size in (4, 2))
    raw = torch.randn(2, 3, T, generator=generator, dtype=dtype)
    return k, v, alpha, torch.nn.functional.logsigmoid(raw)


def test_hard_pooling_by_hand() -> None:
    """Tokens 0, 1, 2 are one slot, 3 and 4 another, importances 1, 3, 4, 1, 1. The first token opens a slot
    whatever it decided. Catches: a mean without weights, of the wrong run, or that takes in the next one."""
    k, v = column(2, 6, 1, 5, 7), column(10, 20, 30, 40, 60)
    log_importance = per_token(1, 3, 4, 1, 1).log()
    expected_k, expected_v = column(2, 5, 3, 5, 6), column(10, 17.5, 23.75, 40, 50)
    for first in (0.0, 1.0):
        found = merge_pairs(k, v, per_token(first, 1, 1, 0, 1), log_importance)
        torch.testing.assert_close(found, (expected_k, expected_v), **EXACT)


def test_soft_pooling_by_hand() -> None:
    """alpha 1/2, 1/4, 1, importances 1: weights z = 1, 3/2, 11/8, 19/8. Catches: alpha applied to the new
    token, or once only; z that forgets alpha."""
    found, _ = merge_pairs(
        column(8, 2, 0, 4), column(0, 0, 0, 0), per_token(0, 0.5, 0.25, 1), per_token(0, 0, 0, 0)
    )
    second = (0.5 * 8 + 2) / 1.5
    third = (0.25 * 1.5 * second + 0) / 1.375
    torch.testing.assert_close(found, column(8, second, third, (1.375 * third + 4) / 2.375), **EXACT)


@pytest.mark.parametrize("hard", [False, True])
def test_parallel_form_is_the_recurrence(hard: bool) -> None:
    """Catches: prefix sums that cancel, runs that leak into each other, heads mixed up."""
    of = pairs(97, hard)
    torch.testing.assert_close(merge_pairs(*of), merge_by_loop(*of), **EXACT)


def test_gradients() -> None:
    """Against differences and the loop. Catches: a detached factor, a gradient to the first alpha."""
    of = [x.requires_grad_() for x in pairs(5, hard=False)]
    assert torch.autograd.gradcheck(merge_pairs, of)
    of = [x.requires_grad_() for x in pairs(40, hard=False)]
    weights = [torch.randn_like(x) for x in merge_pairs(*of)]
    ours, theirs = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(f(*of), weights, strict=True)), of)
        for f in (merge_pairs, merge_by_loop)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (ours[2][..., 0] == 0).all()


def test_extreme_decisions_in_fp32() -> None:
    """As training sees them: alphas of exp(-50) among ones that underflow and ones of exactly 1, importances
    of exp(-100). Over 400 tokens, values to 1e-5 of fp64 and finite gradients. Catches: NaN of 0 * inf, sums
    of logarithms that lose their digits, a quotient of two underflowed weights."""
    k, v, _, _ = pairs(400, hard=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(6)
    scores = 60 * torch.randn(2, 3, 400, generator=generator) - 20
    scores.requires_grad_()
    alpha = scores.sigmoid()
    assert (alpha == 0).any() and (alpha == 1).any() and ((alpha > 1e-30) & (alpha < 1e-10)).any()
    raw = (100 * torch.randn(2, 3, 400, generator=generator)).requires_grad_()
    log_importance = torch.nn.functional.logsigmoid(raw)
    found = merge_pairs(k, v, alpha, log_importance)
    kept = alpha.double() * (alpha >= 1e-30)
    expected = merge_by_loop(k.double(), v.double(), kept, log_importance.double())
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad(sum(x.sum() for x in found), (scores, raw)):
        assert gradient.isfinite().all()


def test_nothing_merged_is_plain_attention() -> None:
    """Bit for bit, whatever the importances are. Catches: an importance that scales a pair of its own."""
    k, v, alpha, log_importance = pairs(30, hard=False)
    merged = merge_pairs(k, v, torch.zeros_like(alpha), log_importance)
    assert torch.equal(merged[0], k) and torch.equal(merged[1], v)


def attend_merged(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, log_importance: Tensor) -> Tensor:
    """As mcore/attention.py does it."""
    merged_k, merged_v = merge_pairs(k, v, alpha, log_importance)
    return dms_attention(q, merged_k, merged_v, shift(torch.log1p(-alpha), 1), window=0)


def test_hard_decisions_are_a_merged_cache() -> None:
    """Each head with a list of slots of its own, token by token. Catches: a slot that stays visible after it
    was merged, a lag off by one, the query's own pair hidden."""
    k, v, alpha, log_importance = pairs(23, hard=True)
    q = torch.randn(2, 6, 23, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = attend_merged(q, k, v, alpha, log_importance)
    for b in range(2):
        for h in range(6):
            g, slots = h // 2, []  # slots: [weight, key sum, value sum]
            for t in range(23):
                omega = log_importance[b, g, t].exp()
                new = [omega, omega * k[b, g, t], omega * v[b, g, t]]
                if slots and alpha[b, g, t] == 1:
                    slots[-1] = [old + more for old, more in zip(slots[-1], new, strict=True)]
                else:
                    slots.append(new)
                keys, values = (torch.stack([slot[i] / slot[0] for slot in slots]) for i in (1, 2))
                weights = (keys @ q[b, h, t] / math.sqrt(4)).softmax(dim=0)
                torch.testing.assert_close(found[b, h, t], weights @ values, **EXACT)


def test_shapes_are_checked() -> None:
    """Catches: broadcasting where heads or tokens do not match."""
    k, v, alpha, log_importance = pairs(6, hard=True)
    for bad in ((k, v[:, :, 1:], alpha, log_importance), (k, v, alpha[..., :1], log_importance)):
        with pytest.raises(ValueError, match="expected k and v"):
            merge_pairs(*bad)
