"""Where a text says its answer."""

import time

import pytest

from megatron_dms.evaluation.answer_letters import choice_letter
from megatron_dms.evaluation.answer_numbers import integer_answer
from megatron_dms.evaluation.answer_text import last_box

BOXES = [
    (r"so \boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\sqrt{\frac{1}{2}}} }", r"\sqrt{\frac{1}{2}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{ 3 } and then \boxed{4", "3"),
    (r"\fbox {7}", "7"),
    (r"a { stray and \boxed{8}", "8"),
    (r"a stray } and \boxed{8}", "8"),
    (r"\boxed{3}, or rather \boxed{}", ""),
    ("3", None),
    (r"\boxed{3", None),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_last_box(text: str, content: str | None) -> None:
    r"""Catches: the first brace taken for the end, \{ counted as a brace, a box that the cut left open."""
    assert last_box(text) == content


def test_degenerate_text_takes_no_time() -> None:
    """Catches: boxes searched anew from each opening (quadratic), patterns that try every split of a run of
    stars (exponential), Python's limit on the digits of an int."""
    start = time.perf_counter()
    assert last_box(r"\boxed{" * 20_000) is None
    assert choice_letter("The answer is $" + "*" * 5000 + "x" + " " * 5000 + "\n" * 20_000) is None
    assert integer_answer(r"\boxed{" + "9" * 10_000 + "}") is None
    assert integer_answer(r"\boxed{" + "0" * 10_000 + "7}") == 7
    assert integer_answer(r"\boxed{7" + " " * 20_000 + r"\text{" * 5000 + "x}") is None
    assert integer_answer(r"\boxed{7" + "^ " * 20_000 + "=" * 20_000 + "}") is None
    assert time.perf_counter() - start < 5
