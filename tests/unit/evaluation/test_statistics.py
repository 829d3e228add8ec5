"""Votes, pass@k and confidence intervals against enumeration and closed forms."""

from itertools import combinations
from math import erf, sqrt

import numpy as np
import pytest

from megatron_dms.evaluation.statistics import (
    average_at_w,
    majority_vote,
    mean_over_problems,
    paired_difference,
    pass_at_k,
)


@pytest.mark.parametrize(
    ("classes", "winner"),
    [
        ([3, 1, 1], 1),
        (["b", "a", "a", "b"], 0),
        ([None, "b", "a", "a", "b", None, None], 1),
        ([0, 1, 2], 0),
        ([2, 1, 0, 1, 0], 1),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority_vote(classes: list[object], winner: int | None) -> None:
    """Catches: ties to the last or the smallest class, None as a class of its own."""
    assert majority_vote(classes) == winner


def test_average_at_w() -> None:
    """Catches: a vote in place of the mean; a problem without chains as 0."""
    assert average_at_w([True, False, False, True, False]) == 0.4
    with pytest.raises(ValueError, match="found no chains"):
        average_at_w([])


@pytest.mark.parametrize("chains", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_choices(chains: int) -> None:
    """Catches: 1 - (1 - c/n)^k, which is biased, and an error where n - c < k. Exact to 1e-12."""
    for correct in range(chains + 1):
        for k in range(1, chains + 1):
            chosen = [any(i < correct for i in choice) for choice in combinations(range(chains), k)]
            assert pass_at_k(chains, correct, k) == pytest.approx(np.mean(chosen), abs=1e-12)


def test_pass_at_k_refusals_and_size() -> None:
    """Catches: floats in binomials, which overflow; arguments out of range."""
    assert pass_at_k(2000, 1, 1000) == 0.5
    for chains, correct, k in ((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)):
        with pytest.raises(ValueError, match=f"found {chains} chains, {correct} correct, k {k}"):
            pass_at_k(chains, correct, k)


def test_bootstrap_against_the_normal_approximation() -> None:
    """Bounds within 5% of the width of mean -+ 1.96 sigma / sqrt(P), P = 400, for two kinds of values.

    Catches: the wrong quantiles (90% in place of 95% is 8% off on each side), the spread of values in place
        of
    means, fewer than P drawn.
    """
    rng = np.random.default_rng(1)
    for values in (rng.random(400), (rng.random(400) < 0.3).astype(float)):
        found = mean_over_problems(values.tolist())
        half = 1.959964 * values.std() / sqrt(400)
        assert found.mean == pytest.approx(values.mean(), abs=1e-12) and found.problems == 400
        assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
        narrow = mean_over_problems(values.tolist(), confidence=erf(1 / sqrt(2)))  # one sigma
        assert narrow.high - narrow.low == pytest.approx(2 * values.std() / sqrt(400), rel=0.05)


def test_bootstrap_by_enumeration() -> None:
    """Of 0, 0, 1: the drawn mean is k/3 with chance C(3, k) 2^(3-k) / 27, so 8, 12, 6 and 1 of 27.

    Catches: drawing without replacement (always 1/3), or bounds that are interchanged.
    """
    found = mean_over_problems([0, 0, 1], confidence=0.5)  # quantiles 0.25 < 8/27 and 20/27 < 0.75 < 26/27
    assert (found.mean, found.low, found.high) == pytest.approx((1 / 3, 0, 2 / 3))
    assert mean_over_problems([0, 0, 1], confidence=0.95).high == pytest.approx(1)  # 26/27 < 0.975


def test_bootstrap_is_seeded() -> None:
    """Catches: the global generator; a seed that is ignored; parts that each start from the seed again."""
    values = np.random.default_rng(0).random(50).tolist()
    assert mean_over_problems(values, seed=3) == mean_over_problems(values, seed=3)
    assert mean_over_problems(values, seed=3) != mean_over_problems(values, seed=4)
    many = np.arange(200_000, dtype=float)  # five resamples at a time
    wide, narrow = (mean_over_problems(many.tolist(), resamples=n, confidence=1 - 1e-9) for n in (20, 5))
    assert wide.high - wide.low > 1.01 * (narrow.high - narrow.low)


def test_paired_difference() -> None:
    """Two methods that differ by 0.1 on each problem, however hard: the difference has no width.

    Catches: the two resampled apart, the sign, lengths that differ.
    """
    hard = np.random.default_rng(0).random(40)
    found = paired_difference((hard + 0.1).tolist(), hard.tolist())
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="found 2 and 1 values"):
        paired_difference([1, 2], [1])


def test_bootstrap_refusals() -> None:
    """Catches: NaN that spreads silently, no problems, a percentage as confidence."""
    for values, options in (
        ([], {}),
        ([1.0, float("nan")], {}),
        ([1.0], {"confidence": 95}),
        ([1.0], {"resamples": 0}),
    ):
        with pytest.raises(ValueError, match="found"):
            mean_over_problems(values, **options)
