"""Eviction decisions and their noise against numbers worked out by hand.

Tolerances: 1e-6 for fp32 closed forms; the noise of given ids is compared exactly.
"""

import math

import pytest
import torch

from megatron_dms.ops.eviction import hard_eviction, logistic_noise, shift, soft_eviction

LN2, LN3 = math.log(2), math.log(3)
INFINITY = float("inf")
# Of seed 1234, samples 0, 1 and 10**12, layer 3, heads 0 and 7, tokens 0, 1 and 4095, made once by
# splitmix64_noise below. A change here makes every earlier run impossible to repeat.
GOLDEN = [
    [[-2.044954, 1.566038, 1.637259], [-0.836037, -3.002066, -1.793577]],
    [[-2.624196, -0.42782, 0.611076], [-0.836309, 0.499264, 3.025981]],
    [[0.469653, 2.173448, -1.511184], [-3.46746, -0.287744, 1.729917]],
]


def close(found: torch.Tensor, expected: list, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=tolerance, atol=tolerance)


def test_soft_decisions_by_hand() -> None:
    """alpha = sigmoid((z + noise) / tau). Catches: noise subtracted, temperature multiplied, log(alpha) in
    the place of log(1 - alpha)."""
    logits = torch.tensor([[[0.0, 0.1 * LN3, 0.0, -0.2 * LN3]]])
    noise = torch.tensor([[[0.0, 0.0, -0.1 * LN3, 0.1 * LN3]]])
    found = soft_eviction(logits, noise, temperature=0.1)
    close(found.alpha, [[[0.5, 0.75, 0.25, 0.25]]])
    close(found.log_keep, [[[-LN2, -2 * LN2, LN3 - 2 * LN2, LN3 - 2 * LN2]]])
    # exactly: the forward value of the straight-through estimator has no trace of alpha
    assert found.hard.tolist() == [[[0, 1, 0, 0]]]


def test_gradients_by_hand() -> None:
    """d log_keep / dz = -alpha / tau, and the hard decision has alpha's gradient alpha (1 - alpha) / tau.
    Catches: a detached relaxation, the straight-through term dropped, log(1 - sigmoid) computed naively (NaN
    or 0 at the last logit, where 1 - alpha underflows)."""
    values = torch.tensor([0.0, 0.1 * LN3, -0.1 * LN3, 60.0])
    alpha = torch.tensor([0.5, 0.75, 0.25, 1.0])
    logits = values.clone().requires_grad_()
    soft_eviction(logits, torch.zeros(()), 0.1).log_keep.sum().backward()
    close(logits.grad, (-alpha / 0.1).tolist(), 1e-5)
    logits = values.clone().requires_grad_()
    soft_eviction(logits, torch.zeros(()), 0.1).hard.sum().backward()
    close(logits.grad, (alpha * (1 - alpha) / 0.1).tolist(), 1e-5)
    assert soft_eviction(values, torch.zeros(()), 0.1).log_keep[-1] == pytest.approx(-600)


def test_bf16_logits_are_decided_in_fp32() -> None:
    """Catches: the relaxation computed in the model's own precision."""
    logits = torch.tensor([0.5, -0.25], dtype=torch.bfloat16)
    found = soft_eviction(logits, torch.tensor([0.125, 0.125]), 0.5)
    close(found.alpha, [1 / (1 + math.exp(-1.25)), 1 / (1 + math.exp(0.25))])
    assert {part.dtype for part in found} == {part.dtype for part in hard_eviction(logits)} == {torch.float32}


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_a_temperature_must_be_positive(temperature: float) -> None:
    """Catches: a check that lets 0 through, which would make every alpha NaN or 0."""
    with pytest.raises(ValueError, match=f"temperature is {temperature}, expected > 0"):
        soft_eviction(torch.zeros(1), torch.zeros(1), temperature)


def test_hard_decisions_by_hand() -> None:
    """alpha = 1[z > 0]. Catches: >= in the place of >, kept and evicted swapped, a large negative number in
    the place of -inf."""
    found = hard_eviction(torch.tensor([[[-3.0, 0.0, 1e-6, 2.0]]]))
    assert found.alpha.tolist() == found.hard.tolist() == [[[0, 0, 1, 1]]]
    assert found.log_keep.tolist() == [[[0, 0, -INFINITY, -INFINITY]]]


@pytest.mark.parametrize(
    ("lag", "expected"),
    [(0, [1, 2, 3, 4]), (1, [2, 3, 4, 9]), (3, [4, 9, 9, 9]), (4, [9, 9, 9, 9]), (7, [9, 9, 9, 9])],
)
def test_shift_by_hand(lag: int, expected: list[float]) -> None:
    """Pair j is judged by token j + lag. Catches: a lag off by one, a shift the other way, a roll (the first
    decisions coming back at the end), a length that changes where the lag is longer than the text."""
    x = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]]])
    found = shift(x, lag, fill=9.0)
    assert found.shape == x.shape and found[0, 0].tolist() == expected
    if lag == 1:
        assert found[0, 1].tolist() == [6, 7, 8, 9]
        assert shift(x, lag)[0, 0, -1] == 0  # no decision yet: kept


def test_shift_carries_the_gradient_back_to_the_deciding_token() -> None:
    """Catches: a shift of the values alone, or of the gradient in the other direction."""
    x = torch.zeros(1, 1, 4, requires_grad=True)
    (shift(x, 1) * torch.tensor([1.0, 10, 100, 1000])).sum().backward()
    assert x.grad.tolist() == [[[0, 1, 10, 100]]]


def test_a_negative_lag_is_refused() -> None:
    """Catches: x[..., -1:] taken without complaint."""
    with pytest.raises(ValueError, match="lag is -1, expected >= 0"):
        shift(torch.zeros(3), -1)


def noise(
    samples: list[int], heads: list[int], tokens: list[int], seed: int = 1234, layer: int = 3
) -> torch.Tensor:
    return logistic_noise(seed, torch.tensor(samples), layer, torch.tensor(heads), torch.tensor(tokens))


def splitmix64_noise(*ids: int) -> float:
    """Compute the same noise in Python's unbounded integers, from the published constants of splitmix64."""
    mask, state = (1 << 64) - 1, 0
    for number in ids:
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    uniform = ((state >> 12) + 0.5) / (1 << 52)
    return math.log(uniform) - math.log1p(-uniform)


def test_golden_noise() -> None:
    """Catches: any change of the hash, also the sign-repeating shift of torch and a lost high bit of an
    id."""
    samples, heads, tokens = [0, 1, 10**12], [0, 7], [0, 1, 4095]
    found = noise(samples, heads, tokens)
    close(found, GOLDEN)
    reference = [[[splitmix64_noise(1234, s, 3, h, t) for t in tokens] for h in heads] for s in samples]
    close(found, reference)


def test_noise_depends_on_global_ids_only() -> None:
    """What sample 5, head 3, token 6 gets is the same in every batch, on every rank and from every chunk.
    Catches noise by rank: ids replaced by places in the batch (arange), by a rank's own head numbers, or
    drawn in sequence from one generator."""
    whole = noise(list(range(8)), list(range(4)), list(range(12)))
    assert whole.shape == (8, 4, 12) and whole.dtype == torch.float32
    parts = {
        "one sample": (noise([5], [0, 1, 2, 3], list(range(12))), whole[5:6]),
        "another order": (noise([7, 5, 0], [0, 1, 2, 3], list(range(12))), whole[[7, 5, 0]]),
        "the heads of TP rank 1": (noise([4, 5], [2, 3], list(range(12))), whole[4:6, 2:]),
        "the tokens of a later chunk": (noise([5], [3], list(range(6, 12))), whole[5:6, 3:, 6:]),
    }
    for name, (found, expected) in parts.items():
        assert torch.equal(found, expected), name
    assert whole.unique().numel() == whole.numel()  # no id was ignored


def test_noise_leaves_random_state_alone() -> None:
    """Catches: noise from torch's generator, which recomputation and resuming would have to restore."""
    before = torch.get_rng_state()
    noise([0], [0], [0])
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_and_layers_differ() -> None:
    """Catches: the seed or the layer left out of the hash, or added to another id (seed 1, layer 2 = seed 2,
    layer 1)."""
    samples, heads, tokens = [0, 1], [0, 1], list(range(50))
    drawn = [noise(samples, heads, tokens, seed, layer) for seed in (1, 2, 3) for layer in (1, 2, 3)]
    assert torch.cat([one.flatten() for one in drawn]).unique().numel() == 9 * 200


def test_noise_is_logistic() -> None:
    """65,536 fixed ids: mean 0, variance pi^2 / 3, and the whole distribution by Kolmogorov and Smirnov.
    Catches: a Gumbel variable (mean 0.58), a logit of a number in [-1/2, 1/2), too few random bits. The
    tolerances are about 4 standard errors of a true sample; the KS bound is that of p = 0.01."""
    drawn = noise(list(range(16)), list(range(8)), list(range(512))).double()
    count = drawn.numel()
    assert drawn.mean().abs() < 0.03
    assert abs(drawn.var() - math.pi**2 / 3) < 0.1
    expected = torch.sigmoid(drawn.flatten().sort().values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum(steps[1:] - expected, expected - steps[:-1]).max()
    assert distance * math.sqrt(count) < 1.63, f"Kolmogorov-Smirnov distance {distance:.4f}"


def test_neighbouring_ids_are_uncorrelated() -> None:
    """Catches: a hash in which one id hardly matters. 5 standard errors of 0.004 each."""
    drawn = noise(list(range(16)), list(range(8)), list(range(513)))
    one, other = noise([0], [0], list(range(65536))), noise([0], [0], list(range(65536)), layer=4)
    pairs = {
        "tokens": (drawn[:, :, 1:], drawn[:, :, :-1]),
        "heads": (drawn[:, 1:], drawn[:, :-1]),
        "samples": (drawn[1:], drawn[:-1]),
        "layers": (one, other),
    }
    for name, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert correlation.abs() < 0.02, name
