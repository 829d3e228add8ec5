"""Pareto fronts against brute force, and mean gains against closed forms."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dms.evaluation.pareto import Point, mean_gain, pareto_front

# Small whole numbers: ties are frequent.
POINTS = st.lists(st.builds(Point, st.integers(1, 8), st.integers(0, 5), st.just("")), max_size=12)


def beats(one: Point, other: Point) -> bool:
    no_worse = one.cost <= other.cost and one.accuracy >= other.accuracy
    return no_worse and (one.cost < other.cost or one.accuracy > other.accuracy)


@given(POINTS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_front_by_brute_force(points: list[Point]) -> None:
    """Catches: a dearer point of equal accuracy, or a less accurate one of equal cost, that stays."""
    expected = {point for point in points if not any(beats(other, point) for other in points)}
    assert pareto_front(points) == sorted(expected)


def test_front_of_labelled_points() -> None:
    """Catches: sorting by the label, which makes the later one of equal points stay."""
    points = [Point(4, 0.5, "z"), Point(4, 0.5, "a"), Point(2, 0.5, "8-32K-4"), Point(1, 0.1), Point(9, 0.4)]
    assert pareto_front(points) == [Point(1, 0.1), Point(2, 0.5, "8-32K-4")]
    assert [point.label for point in pareto_front(points[:2])] == ["z"]
    assert pareto_front([]) == []


@pytest.mark.parametrize("point", [Point(0, 1), Point(-1, 1), Point(1, float("nan")), Point(float("inf"), 1)])
def test_refused_points(point: Point) -> None:
    """Catches: a cost whose logarithm is no number; NaN, which no comparison sees."""
    with pytest.raises(ValueError, match="expected a cost above 0 and finite figures"):
        pareto_front([point])


def test_gain_of_a_shift() -> None:
    """A front that lies 3 higher gains 3, on either scale, and the other loses 3.

    Catches: the sign, an integral that is not divided by its length.
    """
    base = [Point(1, 10), Point(2, 20), Point(16, 50)]
    better = [Point(cost, accuracy + 3) for cost, accuracy, _ in base]
    for scale in ("log", "linear"):
        assert mean_gain(better, base, scale) == pytest.approx(3)
        assert mean_gain(base, better, scale) == pytest.approx(-3)


def test_gain_in_closed_form() -> None:
    """One straight line from (1, 0) to (4, 6) against a constant-like one: worked out by hand.

    log: from 0 to log 4 the line is 6 x / log 4; with a corner (2, 5) the front has the mean
    ((0 + 5) / 2 + (5 + 6) / 2) / 2 = 4 (each half is one doubling); the straight one 3. Gain 1.
    linear: the corner's front has ((0 + 5) / 2 * 1 + (5 + 6) / 2 * 2) / 3 = 13.5 / 3 = 4.5, the straight one
        3.

    Catches: a linear mean of logarithmic lines or the reverse, a mean over the corners, left out corners.
    """
    straight, corner = [Point(1, 0), Point(4, 6)], [Point(1, 0), Point(2, 5), Point(4, 6)]
    assert mean_gain(corner, straight) == pytest.approx(1.0)
    assert mean_gain(straight, corner) == pytest.approx(-1.0)
    assert mean_gain(corner, straight, "linear") == pytest.approx(1.5)


def test_gain_over_the_shared_range_only() -> None:
    """From 2 to 8 alone: the line from (1, 0) to (8, 3) rises by 1 each doubling, the other is at 5 + the
    same.

    Catches: the union of the ranges, fronts held constant beyond their ends, a dominated point in the range.
    """
    first = [Point(2, 6), Point(8, 8), Point(64, 100)]
    second = [Point(1, 0), Point(8, 3), Point(9, 1)]
    assert mean_gain(first, second) == pytest.approx(5)


def test_gain_at_a_single_cost_and_none() -> None:
    """Catches: a division by zero where the ranges touch, 0 in place of "not known"."""
    assert mean_gain([Point(4, 7)], [Point(1, 0), Point(16, 8)]) == pytest.approx(3)
    assert mean_gain([Point(1, 5), Point(4, 7)], [Point(4, 3), Point(8, 9)]) == pytest.approx(4)
    assert mean_gain([Point(1, 5)], [Point(4, 3), Point(8, 9)]) is None
    assert mean_gain([], [Point(4, 3)]) is None
    with pytest.raises(ValueError, match="found scale 'ln'"):
        mean_gain([], [], "ln")  # type: ignore[arg-type]


@given(POINTS, POINTS, st.sampled_from(["log", "linear"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_gain_against_a_fine_grid(first: list[Point], second: list[Point], scale: str) -> None:
    """The exact integral against 20001 trapezoids, to 1e-3 of an accuracy of at most 5.

    Catches: corners of one front only, corners outside the shared range.
    """
    gain = mean_gain(first, second, scale)  # type: ignore[arg-type]
    fronts = [pareto_front(points) for points in (first, second)]
    if not all(fronts) or max(f[0].cost for f in fronts) > min(f[-1].cost for f in fronts):
        assert gain is None
        return
    place = log if scale == "log" else float
    low, high = (place(f) for f in (max(f[0].cost for f in fronts), min(f[-1].cost for f in fronts)))
    grid = np.linspace(low, high, 20001)
    one, other = (
        np.interp(grid, [place(p.cost) for p in front], [p.accuracy for p in front]) for front in fronts
    )
    mean = (one - other)[0] if low == high else np.trapezoid(one - other, grid) / (high - low)
    assert gain == pytest.approx(mean, abs=1e-3)
