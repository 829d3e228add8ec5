"""Comparing the curves of two runs."""

import math
from collections.abc import Iterable

COMPARED = (
    "loss",
    "KL",
    "compression loss",
    "achieved CR (soft)",
    "achieved CR (hard)",
    "CR of the least compressed layer",
    "CR of the most compressed layer",
    "grad-norm",
)
TOLERANCE = 1e-5  # relative, at every step; sums in another order differ by about 1e-6 after six Adam steps


def assert_same_curves(
    found: dict[str, list[float]], expected: dict[str, list[float]], steps: Iterable[int], tolerance: float
) -> None:
    """Each compared scalar agrees at each step (from 0). tolerance: relative; 0 means bit for bit."""
    steps = list(steps)
    for name in COMPARED:
        assert len(found[name]) >= len(steps), f"{name} was logged {len(found[name])} times"
        for step, a in zip(steps, found[name][-len(steps) :], strict=True):
            b = expected[name][step]
            assert math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance * 1e-2), (
                f"{name} at step {step}: {a} found, {b} expected"
            )
