"""Figures of one problem from its chains, and means over problems with their uncertainty.

Shapes: W chains of a problem, P problems.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

_DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its confidence interval from `low` to `high`."""

    mean: float
    low: float
    high: float
    problems: int


def majority_vote(classes: Sequence[Hashable | None]) -> int | None:
    """Return the chain that answers for all chains: the first one of the most frequent class.

    Ties are broken by first occurrence: of the tied classes, the class whose first member comes first wins.
    So the result depends on the order of the chains, but not on chance. A chain with class None abstains.

    Args:
        classes: [W], as `answers.answer_classes` gives them.

    Returns:
        an index into `classes`; None if all abstain.
    """
    counts: dict[Hashable, int] = {}
    for member in classes:
        if member is not None:
            counts[member] = counts.get(member, 0) + 1
    if not counts:
        return None
    winner = max(counts, key=counts.__getitem__)  # max takes the first of equals; dicts keep the order
    return classes.index(winner)


def average_at_w(correct: Sequence[bool]) -> float:
    """Return avg@W: the expected accuracy of a single chain, estimated from W chains.

    Raises:
        ValueError: there are no chains.
    """
    if not correct:
        raise ValueError("found no chains, expected at least one")
    return sum(map(bool, correct)) / len(correct)


def pass_at_k(chains: int, correct: int, k: int) -> float:
    """Return an unbiased estimate of the chance that at least one of k chains is correct.

    With n = `chains` and c = `correct` the estimate is 1 - C(n - c, k) / C(n, k) (Chen et al., arXiv
    2107.03374, equation 1), computed in exact integers.

    Raises:
        ValueError: not 0 <= correct <= chains, or not 1 <= k <= chains.
    """
    if not (0 <= correct <= chains and 1 <= k <= chains):
        raise ValueError(
            f"found {chains} chains, {correct} correct, k {k}; "
            "expected 0 <= correct <= chains and 1 <= k <= chains"
        )
    return 1.0 - comb(chains - correct, k) / comb(chains, k)


def compression_ratio(fraction: float | None) -> float | None:
    """Return 1 / (1 - the evicted fraction); None if the ratio is unbounded or the fraction is unknown."""
    return None if fraction is None or fraction == 1.0 else 1.0 / (1.0 - fraction)


def decisions(tokens_seen: Iterable[int], lag: int) -> int:
    """Return how many eviction decisions each KV head has taken.

    Args:
        tokens_seen: number of tokens of each sequence.
        lag: the first `lag` tokens of a sequence carry no decision.
    """
    return sum(max(seen - lag, 0) for seen in tokens_seen)


def mean_over_problems(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean with a percentile bootstrap interval.

    Problems are drawn with replacement, P of P, `resamples` times; the interval spans the (1 - confidence) /
    2 and (1 + confidence) / 2 quantiles of the drawn means. So it tells how much the figure would vary with
    other problems of the kind. Variation between chains is in it only as far as it shows in `values`. With
    few problems (AIME has 30) it is somewhat too narrow, by about sqrt(1 - 1 / P); if all values are equal,
    its width is 0.

    Args:
        values: [P], a figure of each problem.
        confidence: between 0 and 1.
        seed: equal arguments give equal intervals.

    Raises:
        ValueError: no values, a value that is not finite, or another argument out of range.
    """
    data_P = np.asarray(values, dtype=np.float64)
    if data_P.ndim != 1 or data_P.size == 0 or not np.isfinite(data_P).all():
        raise ValueError(f"found values of shape {data_P.shape}, expected [P] finite ones, P > 0")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"found confidence {confidence}, resamples {resamples}; expected 0 < it < 1, and >= 1"
        )
    generator = np.random.default_rng(seed)
    at_once = max(_DRAWS_AT_ONCE // data_P.size, 1)
    means = [
        data_P[generator.integers(data_P.size, size=(min(at_once, resamples - done), data_P.size))].mean(
            axis=1
        )
        for done in range(0, resamples, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(data_P.mean()), float(low), float(high), data_P.size)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Return the mean of `first` - `second`: two methods on the same P problems in the same order.

    Both values of a problem are drawn together, so whatever makes a problem hard for both methods cancels.
    The interval is therefore narrower than two separate intervals suggest.

    Raises:
        ValueError: the lengths differ, and as `mean_over_problems`.
    """
    if len(first) != len(second):
        raise ValueError(f"found {len(first)} and {len(second)} values, expected the same problems")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return mean_over_problems(differences, confidence, resamples, seed)
