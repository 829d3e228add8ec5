"""The compression schedule: by hand, and that step_of is its inverse. Tolerance: 1e-12 relative."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dms.ops.schedule import CompressionSchedule

PAPER = CompressionSchedule(final_cr=8, steps_per_cr=100)
FRACTION = CompressionSchedule(final_cr=8, steps_per_cr=100, anneal="fraction")


@pytest.mark.parametrize(
    ("step", "cr"),
    [(-5, 1), (0, 1), (1, 1.01), (50, 1.5), (100, 2), (300, 4), (699, 7.99), (700, 8), (701, 8), (10**6, 8)],
)
def test_cr_grows_by_one_in_steps_per_cr(step: int, cr: float) -> None:
    """CR = min(CR_final, 1 + step / steps_per_cr), alpha* = 1 - 1 / CR. Catches: a schedule that starts at
    0 or one step late, that goes past its end, alpha* = 1 / CR."""
    assert PAPER.target_cr(step) == pytest.approx(cr, rel=1e-12)
    assert PAPER.target_fraction(step) == pytest.approx(1 - 1 / cr, rel=1e-12)
    assert PAPER.steps == 700


@pytest.mark.parametrize(
    ("step", "fraction"), [(-1, 0), (0, 0), (70, 0.0875), (350, 0.4375), (700, 0.875), (900, 0.875)]
)
def test_the_evicted_fraction_grows_linearly(step: int, fraction: float) -> None:
    """The paper's other wording: alpha* from 0 to 1 - 1 / CR_final in as many steps. Catches: the two anneals
    mixed up (at step 350 the first has alpha* = 1 - 1 / 4.5)."""
    assert FRACTION.target_fraction(step) == pytest.approx(fraction, rel=1e-12)
    assert FRACTION.target_cr(step) == pytest.approx(1 / (1 - fraction), rel=1e-12)


def test_one_run_gives_a_ladder() -> None:
    """CR 4 after 300 steps and CR 8 after 700, NVIDIA's CR 8 of 16 at step 238 of 510. Catches: a step_of
    that is off by one, or that counts a unit of CR too many (400 and 800)."""
    assert [PAPER.step_of(cr) for cr in (1, 2, 4, 8)] == [0, 100, 300, 700]
    assert CompressionSchedule(16, 34).step_of(8) == 238
    assert [FRACTION.step_of(cr) for cr in (1, 2, 8)] == [0, 400, 700]  # (1/2) / (7/8) of 700 steps


@pytest.mark.parametrize("anneal", ["cr", "fraction"])
def test_a_final_cr_of_one_asks_for_nothing(anneal: str) -> None:
    """Catches: a division by zero steps."""
    schedule = CompressionSchedule(1, 100, anneal)
    for step in (0, 1, 1000):
        assert schedule.target_cr(step) == 1 and schedule.target_fraction(step) == 0
    assert schedule.step_of(1) == 0


@pytest.mark.parametrize("cr", [0.99, 8.01])
def test_a_ratio_that_is_never_asked_for(cr: float) -> None:
    """Catches: a step reported for a CR that the run does not reach."""
    with pytest.raises(ValueError, match=rf"CR {cr} is never asked for: .* from 1 to 8"):
        PAPER.step_of(cr)


@given(
    final_cr=st.floats(1, 64),
    steps_per_cr=st.floats(0.25, 500),
    anneal=st.sampled_from(["cr", "fraction"]),
    share=st.floats(0, 1),
)
def test_step_of_is_the_first_step_that_asks_for_it(
    final_cr: float, steps_per_cr: float, anneal: str, share: float
) -> None:
    """At step_of(c) at least c is asked for and one step earlier less (1e-9 relative for rounding).
    Catches: floor for ceil, an inverse of the other anneal; also a target that falls."""
    schedule = CompressionSchedule(final_cr, steps_per_cr, anneal)
    cr = 1 + share * (final_cr - 1)
    step = schedule.step_of(cr)
    rounding = 1e-9 * (1 + cr**2 / steps_per_cr)  # an ulp of the fraction is cr**2 ulps of CR
    assert schedule.target_cr(step) >= cr - rounding
    assert step == 0 or schedule.target_cr(step - 1) < cr + rounding
    assert schedule.target_cr(step + 1) >= schedule.target_cr(step) - rounding
