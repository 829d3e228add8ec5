r"""Find answers in generated text, and tell when two answers are the same.

Mathematics goes through Math-Verify (`pip install math-verify`; checked with 0.9.0). Its time limits are
alarm signals: `math_answer`, `math_gold` and `math_equal` run in the main thread only (ValueError elsewhere)
and drop an alarm that the caller has set. A comparison that exceeds its time limit counts as unequal.

Throughout, None means "no answer".
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[{}]|[{}]")
# Digits in groups of three, separated by LaTeX spaces: Math-Verify would read them as 1 + 234 or 1 * 0.
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;: ]|\{,\}|\{\\,\}|~| )\d{3})+(?!\d)")


@dataclass(frozen=True)
class MathAnswer:
    """An answer as text and as Math-Verify parsed it: a sympy object (if the text is a formula) and a
    string."""

    text: str
    parsed: tuple[Any, ...]


def _boxes(text: str) -> list[tuple[int, str]]:
    """Return start and content of every complete box, sorted by start.

    The text is read in one pass: text that went wrong may repeat a box very often.
    """
    boxes: list[tuple[int, str]] = []
    opened: list[re.Match[str]] = []
    for brace in _BRACES.finditer(text):
        if brace["box"] or brace[0] == "{":
            opened.append(brace)
        elif brace[0] == "}" and opened:  # \{ and \} do not nest
            opening = opened.pop()
            if opening["box"]:
                boxes.append((opening.start(), text[opening.end() : brace.start()].strip()))
    return sorted(boxes)


def last_box(text: str) -> str | None:
    r"""Return the content of the last complete \boxed{...} or \fbox{...}, stripped; braces may be nested.

    Of several boxes only the last one counts, even if it is empty (""). A box that is never closed does not
    count, for example where the text was cut.
    """
    return max(_boxes(text), default=(0, None))[1]


def math_answer(text: str, seconds: int = 5) -> MathAnswer | None:
    r"""Return the answer of a generated text.

    The last box is the answer. Without a box, Math-Verify chooses: a formula or number after the word
    "answer", or else the last formula or number.

    Args:
        text: with or without the reasoning.
        seconds: time limit of the parser. A box that the parser cannot read still counts, as a text that is
            equal to itself only.

    Returns:
        the answer; None if the text has no box, formula or number, or if the box is empty.
    """
    box = last_box(text)
    if box is not None:
        return _boxed(box, seconds)
    parsed = _parse(text, seconds)
    return MathAnswer(str(parsed[-1]), parsed) if parsed else None


def math_gold(text: str, seconds: int = 5) -> MathAnswer:
    r"""Return the answer of a data set. Without a box, the whole text is the answer; $...$ around it is
    dropped.

    Raises:
        ValueError: the answer is empty.
    """
    box = last_box(text)
    if box is None:
        box = re.sub(r"^(\$\$?|\\\(|\\\[)(.+?)(\$\$?|\\\)|\\\])$", r"\2", text.strip(), flags=re.DOTALL)
    gold = _boxed(box, seconds)
    if gold is None:
        raise ValueError(f"the data set's answer {text!r} is empty")
    return gold


def _boxed(content: str, seconds: int) -> MathAnswer | None:
    if not content:
        return None
    plain = _GROUPED.sub(lambda number: re.sub(r"\D", "", number[0]), content)
    return MathAnswer(content, _parse(rf"\boxed{{{plain}}}", seconds))


def _parse(text: str, seconds: int) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return tuple(parse(text, extraction_config=targets, parsing_timeout=seconds))


def math_equal(gold: MathAnswer, answer: MathAnswer, seconds: int = 5) -> bool:
    """Whether `answer` is right, given `gold`.

    Math-Verify's rules: numbers are compared to 6 decimals, 50% is both 50 and 0.5, units are dropped, the
    order of a list does not matter, and "x = 5" is 5. An interval answers a gold inequality; an inequality
    does not answer a gold interval.

    Args:
        seconds: time limit of each of up to four comparisons (of parsed answers and strings).
    """
    from math_verify import verify

    if gold.text == answer.text:
        return True
    return bool(verify(list(gold.parsed), list(answer.parsed), timeout_seconds=seconds))


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


# The end of a box: degrees, or words in \text that do not change the number.
_UNIT = re.compile(
    r"(?:°|\\degree|\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\(?:text|textrm|mathrm)\s*\{"
    r"(?!\s*(?:hundred|thousand|million|dozen|percent|mod|or|and|to)\b)[A-Za-z /.]+\}"
    r"(?:\s*\^\s*(?:\d|\{\d\}))?)\s*\$?$"
)
# The quantifiers are possessive, so runs of stars or spaces are read once and in one way.
_OPEN = r"(?:[*_$(\[\s]|\\\(|\\(?:text\w*+|math\w*+)\s*+\{)*+"
_STATED = (
    r"(?i:\b(?:answer|option|choice)[*_]*+\s*+(?:(?:is|would be|must be|should be)\b\s*+:?|[:=])[*_]*+\s*+"
    r"(?:(?:option|choice)\b\s*+)?)"
)


def choice_letter(text: str, letters: str = "ABCD") -> str | None:
    r"""Return the letter that a text gives as its answer to a multiple choice question; only capitals count.

    Explicit statements come first: \boxed{C}, "the answer is (C)", "Answer: **C**", "correct option: C"; the
    last statement wins. Without a statement, the answer is the last letter that stands alone in bold (**C**,
    **(C) 42**) or on a line of its own. "A" followed by a word is the article; a letter followed by "or B" or
    "and B" is not a choice.
    """
    letter = rf"([{re.escape(letters)}])(?![\w'’+-])(?![ \t]+(?!because\b|since\b|as\b)(?<=A[ \t])\w)"
    letter += rf"(?!\W*\s(?:or|and)\W+(?:(?i:option|choice)\s+)?[{re.escape(letters)}]\b)"
    stated = [(found.start(), found[1]) for found in re.finditer(_STATED + _OPEN + letter, text)]
    for start, content in _boxes(text):
        # The box may hold the option's text too, "(C) 42" or "C. 42", but not a formula such as C_5 or C+1.
        inside = re.match(_OPEN + letter + r"\s*+\}*+\s*+(?:$|[).:\]},])", content)
        if inside:
            stated.append((start, inside[1]))
    if stated:
        return max(stated)[1]
    alone = rf"\*\*[ \t]*+\(?{letter}(?:[).:][^*\n]*+)?\*\*|^[ \t]*+\(?{letter}[).]{{0,2}}[ \t]*+$"
    found = [match[1] or match[2] for match in re.finditer(alone, text, re.MULTILINE)]
    return found[-1] if found else None


def integer_answer(text: str, low: int = 0, high: int = 999) -> int | None:
    r"""Return the whole number that a text gives as its answer.

    The number stands in the last box or, without a box, after the last "answer is" or "answer:". It is read
    exactly, as AIME's answers (0 to 999) require. Leading zeros are allowed, and so are zeros after the
    decimal point, degrees, and a unit in \text{...} at the end; of an equation, the part after the last "="
    counts. Any other decimal, a fraction, an inequality or several numbers are not an answer. A number that
    is merely mentioned is not an answer either: in a vote over chains that were cut off, such numbers would
    outvote the answers.

    Returns:
        the number; None if there is no answer, or if the number is not within `low` to `high`.
    """
    content = last_box(text)
    if content is None:
        stated = r"(?:[*_$\s]|\\\(|\\\[)*(-?[\d,]*\d(?:\.0+)?)(?![\d\w]|[.,/%]\d|\^(?!\s*\{?\s*\\circ))"
        found = re.findall(r"(?i:\banswer)[*_]*\s*(?:is\b:?|[:=])" + stated, text)
        content = found[-1] if found else ""
    content = _UNIT.sub("", content)
    content = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}|[$\s~]|\\[,!;: ]|\{,\}", r"\1", content)
    *left, content = re.split(r"(?<![<>!])(?<!\\not)=", content)
    if len(left) > 1 and re.search(r"[,;][A-Za-z\\]|\d\s*(?:and|or)", left[-1]):
        return None  # two equations
    number = re.fullmatch(r"(-?)0*(\d{1,18}|\d{1,3}(?:,\d{3}){1,5})(?:\.0*)?", content)
    if number is None:
        return None
    value = int(number[1] + number[2].replace(",", ""))  # Python refuses more than 4300 digits
    return value if low <= value <= high else None
