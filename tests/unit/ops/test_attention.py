"""The dense reference attention against loops in fp64, written from the method's description alone.

Tolerances: 1e-12 in fp64 (values and gradients), 1e-5 in fp32, one rounding (2**-8) in bf16.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dms.ops.attention import dms_attention
from megatron_dms.ops.eviction import shift

B, H, D = 2, 4, 6


def loops(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, window: int, lag: int, scale: float) -> Tensor:
    """Attend by loops: query i weighs key j <= i with exp(score), times 1 - alpha[j + lag] where i - j >
    window.

    A pair whose deciding token is not there yet is kept. alpha is [B, G, T], not shifted.
    """
    group_size = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // group_size
            for i in range(q.shape[2]):
                weights = []
                for j in range(i + 1):
                    weight = (scale * (q[b, h, i] * k[b, g, j]).sum()).exp()
                    if i - j > window and j + lag < q.shape[2]:
                        weight = weight * (1 - alpha[b, g, j + lag])
                    weights.append(weight)
                total = sum(weights)
                for j, weight in enumerate(weights):
                    out[b, h, i] = out[b, h, i] + weight / total * v[b, g, j]
    return out


def inputs(groups: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and alpha in fp64; alpha goes from almost kept to almost evicted."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, heads, tokens, D, dtype=torch.float64, generator=generator)
        for heads in (H, groups, groups)
    )
    alpha = torch.sigmoid(3 * torch.randn(B, groups, tokens, dtype=torch.float64, generator=generator))
    return q, k, v, alpha


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("tokens", "window"), [(1, 0), (7, 0), (7, 3), (7, 6), (7, 9)])
def test_values_and_gradients_equal_the_loops(groups: int, tokens: int, window: int) -> None:
    """Catches: window off by one (>= for >), query heads dealt out to KV heads in turn instead of in
    blocks, a bias on the query's axis, a bias of another head, a gradient of q, k, v or log_keep that is
    lost."""
    parts = inputs(groups, tokens)
    expected_parts = [part.clone().requires_grad_() for part in parts]
    expected = loops(*expected_parts, window, lag=0, scale=D**-0.5)
    found_parts = [part.clone().requires_grad_() for part in parts]
    q, k, v, alpha = found_parts
    found = dms_attention(q, k, v, torch.log1p(-alpha), window)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for result in (found, expected):
        (result * weights).sum().backward()
    for name, one, other in zip(("q", "k", "v", "alpha"), found_parts, expected_parts, strict=True):
        wanted = torch.zeros_like(one) if other.grad is None else other.grad
        torch.testing.assert_close(
            one.grad, wanted, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
    # the keys that some query sees beyond the window, and no others, get a gradient on their decision
    judged = max(tokens - window - 1, 0)
    assert (found_parts[3].grad[..., :judged] != 0).all() and (found_parts[3].grad[..., judged:] == 0).all()


@pytest.mark.parametrize("lag", [0, 1, 3, 9])
def test_with_a_lag(lag: int) -> None:
    """Decisions are predicted, shifted, then used as a mask. Catches: a lag off by one or in the other
    direction, the last pairs, whose decision is missing, evicted."""
    q, k, v, alpha = inputs(groups=2, tokens=8, seed=2)
    found = dms_attention(q, k, v, shift(torch.log1p(-alpha), lag), 2)
    torch.testing.assert_close(found, loops(q, k, v, alpha, 2, lag, D**-0.5), rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    """Uses finite differences in fp64, which share nothing with autograd. Catches: a detached part."""
    parts = [part[:1, :, :4].clone().requires_grad_() for part in inputs(groups=2, tokens=5, seed=3)]
    q, k, v, alpha = parts
    log_keep = alpha.detach().log().requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: dms_attention(*args, 1), (q, k, v, log_keep))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_all_kept_is_plain_causal_attention(groups: int) -> None:
    """Catches: a mask that hides or shows the token itself wrongly, a bias where log_keep is 0."""
    q, k, v, _ = inputs(groups, 9)
    for window in (0, 4, 20):
        found = dms_attention(q, k, v, torch.zeros(B, groups, 9), window)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [0, 1, 3, 8])
def test_all_evicted_is_a_sliding_window(window: int) -> None:
    """Each query sees window + 1 keys, itself included. Catches: window off by one to either side."""
    q, k, v, _ = inputs(groups=2, tokens=9)
    found = dms_attention(q, k, v, torch.full((B, 2, 9), float("-inf")), window)
    age = torch.arange(9)[:, None] - torch.arange(9)
    seen = (age >= 0) & (age < window + 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if window == 0:
        torch.testing.assert_close(found, v.repeat_interleave(2, dim=1))  # each token sees itself alone


def test_one_surviving_key() -> None:
    """Scores 0 everywhere, window 0, all evicted but key 1 of KV head 0: from token 2 on, output = mean of
    its own and key 1's value. Catches: a decision that leaks to another KV head or sample."""
    q, k = torch.zeros(B, 4, 5, D), torch.ones(B, 2, 5, D)
    v = torch.randn(B, 2, 5, D, generator=torch.Generator().manual_seed(4))
    log_keep = torch.full((B, 2, 5), float("-inf"))
    log_keep[0, 0, 1] = 0
    found = dms_attention(q, k, v, log_keep, 0)
    expected = v.clone()
    expected[0, 0, 2:] = (v[0, 0, 2:] + v[0, 0, 1]) / 2
    torch.testing.assert_close(found, expected.repeat_interleave(2, dim=1))


def test_evicted_pairs_leave_finite_gradients() -> None:
    """Catches: -inf - -inf in the softmax or its gradient."""
    q, k, v, _ = (part.float().requires_grad_() for part in inputs(groups=2, tokens=9))
    log_keep = torch.full((B, 2, 9), float("-inf"))
    dms_attention(q, k, v, log_keep, 2).square().sum().backward()
    for part in (q, k, v):
        assert part.grad.isfinite().all() and part.grad.any()


def test_scale() -> None:
    """Catches: the argument ignored, or applied beside the default."""
    q, k, v, alpha = inputs(groups=2, tokens=5)
    for scale in (None, 0.3, 1.0):
        expected = loops(q, k, v, alpha, 1, 0, 1 / math.sqrt(D) if scale is None else scale)
        found = dms_attention(q, k, v, torch.log1p(-alpha), 1, scale)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Inputs rounded to `dtype`, then the loops in fp64 on them: the only other rounding is the result's.
    Catches: scores or softmax in bf16 (errors 10 times larger)."""
    parts = [part.to(dtype) for part in inputs(groups=2, tokens=9)[:3]]
    alpha = inputs(groups=2, tokens=9)[3]
    found = dms_attention(*parts, torch.log1p(-alpha).float(), 2)
    expected = loops(*(part.double() for part in parts), alpha, 2, 0, D**-0.5)
    assert found.dtype == dtype
    relative = 1e-5 if dtype == torch.float32 else 1.01 * 2**-8  # half of the last of 8 bits
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 3, 5, 6)}, "H a multiple of G"),
        ({"k": (2, 2, 4, 6)}, "expected q"),
        ({"k": (2, 2, 5, 8)}, "expected q"),
        ({"v": (2, 1, 5, 6)}, r"v \(2, 1, 5, 6\)"),
        ({"log_keep": (2, 4, 5)}, r"log_keep \(2, 4, 5\)"),
        ({"log_keep": (2, 2, 1)}, r"log_keep \(2, 2, 1\)"),
        ({"window": -1}, "window is -1, expected >= 0"),
    ],
)
def test_wrong_shapes_are_refused(change: dict, message: str) -> None:
    """Catches: a shape that torch would broadcast in silence, such as one decision for all tokens."""
    shapes = {"q": (2, 4, 5, 6), "k": (2, 2, 5, 6), "v": (2, 2, 5, 6), "log_keep": (2, 2, 5)}
    shapes |= {"window": 1} | change
    if change.get("k") == (2, 3, 5, 6):
        shapes |= {"v": (2, 3, 5, 6), "log_keep": (2, 3, 5)}
    window = shapes.pop("window")
    with pytest.raises(ValueError, match=message):
        dms_attention(*(torch.zeros(shape) for shape in shapes.values()), window)
