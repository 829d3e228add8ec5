r"""Find mathematical answers in generated text, and tell when two answers are the same.

A box is read by this package (formula_shapes.py), exactly and as a whole. Math-Verify (`pip install
math-verify`; checked with 0.9.0) finds the answer of a text without a box. Its time limits are alarm signals:
for such texts, `math_answer` runs in the main thread only (ValueError elsewhere) and drops an alarm that the
caller has set.

Throughout, None means "no answer".
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_dms.evaluation.answer_text import last_boxes, visible
from megatron_dms.evaluation.formula_equality import equal
from megatron_dms.evaluation.formula_numbers import Unreadable
from megatron_dms.evaluation.formula_shapes import Shape, read
from megatron_dms.evaluation.formula_text import cleaned, plain

_PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:and|or|sqrt|pi|sin|cos|tan|ln|log)\b)[A-Za-z]{2,}(?![^{]*\})")
_SEARCHED = 20_000  # characters at the end of a text without a box


@dataclass(frozen=True)
class MathAnswer:
    """An answer as text, and what was read in it: one shape of formula_shapes.py, or none."""

    text: str
    parsed: tuple[Any, ...]


def math_answer(text: str, seconds: int = 5) -> MathAnswer | None:
    r"""Return the answer of a generated text.

    Thoughts do not count (see `visible`). The last box is the answer, or the last boxes if only commas or
    "and" stand between them. Without a box, the answer is the formula after the last "answer is" or
    "answer:"; if that cannot be read as a whole, Math-Verify chooses: a formula or number after the word
    "answer", or else the last formula or number.

    Args:
        text: with or without the reasoning.
        seconds: time limit of Math-Verify. A box that cannot be read still counts, as a text that is equal to
            itself only.

    Returns:
        the answer; None if the text has no box, formula or number, or if the box is empty.
    """
    text = visible(text)
    found = last_boxes(text)
    if found:
        return _answer(", ".join(filter(None, found)))
    return _stated(text) or _chosen(text[-_SEARCHED:], seconds)


def math_gold(text: str) -> MathAnswer:
    r"""Return the answer of a data set. Without a box, the whole text is the answer.

    Raises:
        ValueError: the answer is empty.
    """
    found = last_boxes(text)
    gold = _answer(", ".join(found) if found else text.strip())
    if gold is None:
        raise ValueError(f"the data set's answer {text!r} is empty")
    return gold


def math_equal(gold: MathAnswer, answer: MathAnswer) -> bool:
    """Whether `answer` is right, given `gold`.

    Numbers are compared exactly, or to 6 or more decimals if one of both is a decimal number with as many.
    50% is both 50 and 0.5. A unit is dropped unless both have one and the units differ. A numeral with a base
    (52_8) is its digits and its base. The order of a list or a set
    does not matter, that of a tuple does. "x = 5" is 5, but not "y = 5". An interval answers a gold
    inequality; an inequality answers a gold interval unless that may be a point such as (1, 2). What cannot
    be read as a whole is equal to the same text only.
    """
    if gold.text == answer.text:
        return True
    if gold.parsed and answer.parsed:
        return equal(gold.parsed[0], answer.parsed[0])
    return plain(cleaned(gold.text)) == plain(cleaned(answer.text))


def _answer(content: str) -> MathAnswer | None:
    if not content.strip():
        return None
    shape = _read(content)
    return MathAnswer(content, () if shape is None else (shape,))


@lru_cache(maxsize=4096)
def _read(content: str) -> Shape | None:
    try:
        return read(cleaned(content))
    except Unreadable:
        return None


def _stated(text: str) -> MathAnswer | None:
    """Return what stands after the last "answer is" or "answer:", if all of it can be read."""
    found = re.findall(r"(?i:\banswer)[*_]*\s*(?:is\b:?|[:=])[*_\s:]*([^\n]{1,400})", text)
    if not found:
        return None
    line = found[-1].strip()
    formula = re.match(r"(\$\$?|\\\(|\\\[)(.+?)(?:\$\$?|\\\)|\\\])[*_]*\s*(?:[.,;]|$)", line)
    for candidate in (formula[2] if formula else None, re.split(r"\.(?:\s|$)", line)[0].strip("* _")):
        if candidate and _PROSE.search(candidate):
            # Words are no letters that are multiplied; 9 cats and 10 dogs is no 9.
            candidate = None if "\\" in candidate else rf"\text{{{candidate}}}"
        if candidate and (answer := _answer(candidate)) and answer.parsed:
            return answer
    return None


def _chosen(text: str, seconds: int) -> MathAnswer | None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parsed = parse(text, extraction_config=targets, parsing_timeout=seconds)
    return _answer(str(parsed[-1])) if parsed else None


def answer_classes[T](
    answers: Sequence[T | None], equal: Callable[[T, T], bool] = lambda a, b: a == b
) -> list[int | None]:
    """Number the classes of equal answers, for a vote. For mathematics, `equal` is `math_equal`.

    Two answers are in one class if `equal` says so in either order, or if a sequence of such pairs joins
    them: equality to 6 decimals is not transitive, nor is equality of percentages. So the classes do not
    depend on the order of the answers.

    Args:
        answers: the answers of a problem's chains.

    Returns:
        for each answer the index of the first answer in its class; None for None.
    """
    classes: list[int | None] = []
    for index, answer in enumerate(answers):
        if answer is None:
            classes.append(None)
            continue
        joined: set[int] = set()
        for earlier, known in enumerate(classes):
            other = answers[earlier]
            if known is None or known in joined or other is None:
                continue
            if equal(other, answer) or equal(answer, other):
                joined.add(known)
        first = min(joined, default=index)
        classes = [first if known in joined else known for known in classes] + [first]
    return classes
