"""Pareto fronts of accuracy over cost, and the mean gain of one method's front over another's.

A point is one budget (W-L-CR) of a method: its cost, such as KV reads or peak tokens, and its accuracy.
"""

import itertools
from collections.abc import Iterable, Sequence
from math import isfinite, log
from typing import Literal, NamedTuple


class Point(NamedTuple):
    cost: float
    """Above 0; a lower cost is better."""
    accuracy: float
    """A higher accuracy is better."""
    label: str = ""


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other point beats, by rising cost and (strictly) rising accuracy.

    A point is beaten by a point that is no worse in both respects and better in one. Of points that are equal
    in both respects, only the first one given stays.

    Raises:
        ValueError: a cost is not above 0, or a figure is not finite.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):  # stable
        if not (isfinite(point.cost) and isfinite(point.accuracy) and point.cost > 0):
            raise ValueError(f"found {point}, expected a cost above 0 and finite figures")
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def mean_gain(
    method: Iterable[Point], baseline: Iterable[Point], scale: Literal["log", "linear"] = "log"
) -> float | None:
    """Return by how much the front of `method` lies above the front of `baseline`: a mean over shared costs.

    The points of each front are joined by straight lines. The difference of the two lines is integrated
    exactly over the shared range of costs and divided by the length of that range. Fronts are not extended
    beyond their own points: the shared range runs from the dearer of the two cheapest points to the cheaper
    of the two dearest points. If the range is a single cost, the gain is the difference there.

    The paper quotes mean gains at equal KV reads; the notes that this project works from do not say how the
    mean is taken. So figures may differ from the paper's in the last digit.

    Args:
        scale: "log" draws the lines and takes the mean over the logarithm of the cost: budgets come as powers
            of two, so each doubling counts the same. On "linear", the dearest doubling alone makes up half of
            the mean.

    Returns:
        the gain in the unit of the accuracies; None if no cost is shared or a side has no points.

    Raises:
        ValueError: the scale is unknown, and as `pareto_front`.
    """
    if scale not in ("log", "linear"):
        raise ValueError(f"found scale {scale!r}, expected 'log' or 'linear'")
    above, below = (
        [
            (log(point.cost) if scale == "log" else point.cost, point.accuracy)
            for point in pareto_front(points)
        ]
        for points in (method, baseline)
    )
    if not above or not below:
        return None
    low, high = max(above[0][0], below[0][0]), min(above[-1][0], below[-1][0])
    if low > high:
        return None
    knots = [low, *sorted({x for x, _ in above + below if low < x < high}), high]
    gains = [_interpolate(above, x) - _interpolate(below, x) for x in knots]
    if low == high:
        return gains[0]
    area = sum(
        (right - left) * (gains[i] + gains[i + 1]) / 2
        for i, (left, right) in enumerate(itertools.pairwise(knots))
    )
    return area / (high - low)


def _interpolate(line: Sequence[tuple[float, float]], x: float) -> float:
    """Return the height of `line` at x; the corners of the line rise in x, and x lies between them."""
    for (left, start), (right, end) in itertools.pairwise(line):
        if x <= right:
            return start + (end - start) * (x - left) / (right - left)
    return line[-1][1]
