r"""Find the number that a generated text gives as its answer: a whole one for AIME, a decimal one for GSM8K.

A number counts only if it is the whole answer: in the last box, or after the last "answer is" or "answer:".
What is computed from a number (\sqrt{144}, 12!, 1/2, 7:30) is not that number.
"""

import re
from collections.abc import Sequence

from megatron_dms.evaluation.answer_text import last_boxes, visible
from megatron_dms.evaluation.formula_leaves import without_unit
from megatron_dms.evaluation.formula_numbers import Unreadable
from megatron_dms.evaluation.formula_shapes import SEPARATORS, SIGNS, enclosed, split
from megatron_dms.evaluation.formula_text import cleaned
from megatron_dms.evaluation.formula_tokens import UNITS, tokens_of
from megatron_dms.evaluation.formula_values import Token

_STATED = re.compile(r"(?:(?i:\banswer)[*_]*\s*(?:is\b:?|[:=：])|####)\s*", re.MULTILINE)
_FORMULA = re.compile(
    r"[*_\s]*(?:\$\$?(?=[^$\d]|[^$\n]+\$)([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])([^\n]{0,20})", re.DOTALL
)
_NUMBER = re.compile(
    r"""[*_\s`"'(]*(?P<number>(?:[-−–]\s?)?(?:\\?\$|[€£¥])?\s?(?:[-−–]\s?)?"""
    r"""(?:\d[\d,]*(?:[ ~]\d{3}(?!\d))*(?:\.\d+)?|\.\d+))"""
)
# After a number: what makes it another number, or one of several.
_GOES_ON = re.compile(
    r"(?i)[\w^!‰]|[.,:/]\d|\s*(?:/|\^|!|[-–—×*+÷]\s*\d|\\(?:sqrt|frac|cdot|times|pi|div|pm|over)\b)|"
    r"\s+(?:\d|(?:to|or|and|times|plus|minus)\s+\$?\d|(?:hundred|thousand|million|billion|trillion|dozen)s?\b)"
)
_ANOTHER = re.compile(r"\s+(?:or|and|to)\s+[$\\(\[]*-?\d")
_EQUATION = re.compile(r"[*_\s`$]*(?:[A-Za-z]\b|[\d+\-−*/×÷·()., ])+=\s*")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ")
_PER_CENT = re.compile(r"(?i)\s*(?:\\?%|percent\b|per cent\b)")


def integer_answer(text: str, low: int = 0, high: int = 999) -> int | None:
    r"""Return the whole number that a text gives as its answer; thoughts do not count.

    The number stands in the last box or, without a box, after the last "answer is" or "answer:". It is read
    exactly, as AIME's answers (0 to 999) require. Leading zeros are allowed, and so are zeros after the
    decimal point, brackets, styles, degrees, and a unit at the end; of an equation, the part after the last
    "=" counts. Any other decimal, a percentage, a fraction, an inequality or several numbers are not an
    answer. A number that is merely mentioned is not an answer either: in a vote over chains that were cut
    off, such numbers would outvote the answers.

    Returns:
        the number; None if there is no answer, or if the number is not within `low` to `high`.
    """
    text = visible(text)
    boxes = last_boxes(text)
    if len(boxes) > 1:
        return None
    found = number_of(boxes[0]) if boxes else stated_number(text)
    number = re.fullmatch(r"(-?)0*(\d{1,18})(?:\.0*)?", found or "")
    if number is None:
        return None
    value = int(number[1] + number[2])  # Python refuses more than 4300 digits
    return value if low <= value <= high else None


def number_of(content: str, words: bool = False) -> str | None:
    """Return the number that a box holds, without separators and unit.

    Args:
        words: also accept words before the number, a percentage, and units without a mark.
    """
    try:
        tokens = tokens_of(cleaned(content))
        parts, _ = split(tokens, SEPARATORS)
        sides, signs = split(tokens, SIGNS)
        if len(parts) > 1 or set(signs) - {"="} or any(token.text == r"\not" for token in tokens):
            return None
        rest: Sequence[Token] = sides[-1]
        rest = _after_colon(rest)
        if words:
            rest = _without_words(rest)
        rest, percent, _ = without_unit(rest)
    except Unreadable:
        return None
    while len(rest) > 2 and rest[0].text in ("(", "[", "{") and enclosed(rest):
        rest = rest[1:-1]
    sign = ""
    if len(rest) == 2 and rest[0].text in ("-", "+"):
        sign, rest = rest[0].text.strip("+"), rest[1:]
    if len(rest) != 1 or rest[0].kind != "number" or (percent and not words):
        return None
    return sign + rest[0].text


def _after_colon(tokens: Sequence[Token]) -> Sequence[Token]:
    """Drop "Answer:" from a box."""
    end = next((index for index, token in enumerate(tokens) if token.kind != "word"), 0)
    return tokens[end + 1 :] if end and tokens[end].text == ":" else tokens


def _without_words(tokens: Sequence[Token]) -> Sequence[Token]:
    """Drop the words before a number, and letters after the number that are a unit: 12km."""
    start = 0
    while start < len(tokens) and (tokens[start].kind == "word" or tokens[start].text == ":"):
        start += 1
    rest = list(tokens[start:])
    if len(rest) > 3 and rest[-2].text == "^" and rest[-1].text in ("2", "3") and rest[-3].kind == "letter":
        rest = rest[:-2]  # 12 m^2, and 12x^2 is still no number
        if rest[-1].text.lower() not in UNITS and "".join(t.text for t in rest[-2:]).lower() not in UNITS:
            return tokens
    end = len(rest)
    while end and rest[end - 1].kind == "letter":
        end -= 1
    if end and "".join(token.text for token in rest[end:]).lower() in UNITS:
        return rest[:end]
    return rest


def stated_number(text: str, words: bool = False) -> str | None:
    """Return the number after the last "answer is", "answer:" or "####" that is followed by a number.

    Args:
        words: as in `number_of`.
    """
    for stated in reversed(list(_STATED.finditer(text))):
        line = text[stated.end() :].split("\n", 1)[0][:400]
        formula = _FORMULA.match(line)
        if formula:
            content = formula[1] or formula[2] or formula[3]
            if (_PER_CENT.match(formula[4]) and not words) or _ANOTHER.match(formula[4]):
                return None
            return number_of(content, words)
        while equation := _EQUATION.match(line):
            line = line[equation.end() :]
        number = _NUMBER.match(line)
        if number is None:
            continue
        after = line[number.end() :]
        if _GOES_ON.match(after) and not _DEGREES.match(after):
            return None
        if _PER_CENT.match(after) and not words:
            return None
        return number_of(number["number"].replace("\\$", "").replace("$", ""), words)
    return None
