"""Answers in the shapes of MATH-500's: rewritten, they are right; changed in one sign, they are wrong."""

import re

from tests.support.answer_rewritings import GOLDS, REWRITINGS, grade, near_misses, rewritings
from tests.support.tools import ROOT


def test_rewritings_are_right_and_near_misses_are_wrong() -> None:
    """Catches: a style command that makes an answer unreadable, a part of an answer that counts as the whole,
    and figures in docs/tasks.md that are not those of this test."""
    written = list(rewritings())
    lost = [(gold, name) for gold, name, text in written if not grade(gold, text)]
    missed = list(near_misses())
    mistaken = [(gold, other) for gold, other in missed if grade(gold, rf"\boxed{{{other}}}")]
    print(f"{len(written) - len(lost)} of {len(written)} right, {len(mistaken)} of {len(missed)} mistaken")
    assert len(GOLDS) >= 120 and len(REWRITINGS) >= 8 and not lost and not mistaken
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    said = re.search(
        r"grades\s+(\d+)\s+answers .*?([\d,]+)\s+of\s+([\d,]+)\s+rewritings .*?"
        r"(\d+)\s+of\s+([\d,]+)\s+near misses",
        page,
        re.DOTALL,
    )
    assert said is not None
    figures = [int(figure.replace(",", "")) for figure in said.groups()]
    assert figures == [len(GOLDS), len(written), len(written), 0, len(missed)]
