"""Read a single formula with what stands beside it: a unit, a per cent sign, a base."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from megatron_dms.evaluation.formula_numbers import MP, Unreadable, Value
from megatron_dms.evaluation.formula_tokens import UNITS
from megatron_dms.evaluation.formula_values import POINTS, Token, evaluate, letters

type Tokens = Sequence[Token]

_NUMERALS = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_BASES = {word: number for number, word in enumerate(_NUMERALS.split(), 2)}
# Words after a number that make it another one, or no number.
_NO_UNITS = frozenset(
    "hundred thousand million billion trillion dozen mod modulo base not no none than less more least most "
    "over under plus minus about approximately undefined if when for where is are to by from of".split()
)


@dataclass(frozen=True)
class Leaf:
    """A formula: its values at the points, and what stands beside it."""

    values: tuple[Value, ...] = field(repr=False)  # they may be too long to print
    constant: bool
    percent: bool = False
    unit: str | None = None
    """A unit of UNITS with its power, such as "cm^2"; other words in brackets; None if there are none, or
    only "units"."""
    base: int | None = None
    """Of a numeral such as 52_8, whose digits are `digits`."""
    digits: str = ""
    places: int | None = None
    """Digits after the point of a number that is written as a decimal number."""


def leaf(tokens: Tokens) -> Leaf:
    numeral = _numeral(tokens)
    if numeral is not None:
        return numeral
    tokens, percent, unit = without_unit(tokens)
    sign = 1
    rest = list(tokens)
    while rest and rest[0].text in ("+", "-") and len(rest) == 2:
        sign, rest = (-sign if rest[0].text == "-" else sign), rest[1:]
    if len(rest) == 1 and rest[0].text == r"\infty":
        return Leaf((sign * MP.inf,) * POINTS, True)
    constant = not letters(tokens)
    if constant:
        values = (evaluate(tokens, -1),) * POINTS
    else:
        values = tuple(evaluate(tokens, point) for point in range(POINTS))
    places = None
    if len(rest) == 1 and rest[0].kind == "number" and "." in rest[0].text:
        places = len(rest[0].text.partition(".")[2])
    return Leaf(values, constant, percent, unit, places=places)


def _numeral(tokens: Tokens) -> Leaf | None:
    r"""Read 52_8, 4F_{16}, (52)_8, 52_\text{eight} or 52 base 8."""
    text = "".join(token.text for token in tokens)
    found = re.fullmatch(r"[({]*([0-9A-Z]+)[)}]*(?:_|(?:in)?base)[({]*(?:base)?(\d+|[a-z]+)[)}]*", text)
    if (
        found is None
        or not any(sign.isdigit() for sign in found[1])
        or (found[1][0].isalpha() and "base" in text)
    ):
        return None
    word = found[2]
    base = int(word) if word.isdigit() else _BASES.get(word)
    if base is None or base < 2:
        raise Unreadable("a base")
    digits = found[1].lstrip("0") or "0"
    try:
        value = Fraction(int(digits, base)) if base <= 36 and len(digits) < 4000 else Fraction(0)
    except ValueError as error:
        raise Unreadable("a digit that the base lacks") from error
    return Leaf((value,) * POINTS, True, base=base, digits=digits)


def without_unit(tokens: Tokens) -> tuple[Tokens, bool, str | None]:
    """Take a unit, a per cent sign or degrees from the end of a formula."""
    rest = list(tokens)
    if rest and rest[-1].text == "%":
        return _of_number(rest[:-1]), True, None
    if rest and rest[-1].text.lower() == "percent" and rest[-1].kind == "word":
        return _of_number(rest[:-1]), True, None
    texts = [token.text for token in rest]
    for ending in (["^", r"\circ"], ["^", "{", r"\circ", "}"]):
        for scale in ([], ["C"], ["F"]):
            if texts[-len(ending + scale) :] == ending + scale and len(texts) > len(ending + scale):
                return rest[: -len(ending + scale)], False, "degree" + "".join(scale)
    end = len(rest)
    while end and (rest[end - 1].kind == "word" or _power_of_word(rest, end)):
        end -= 1 if rest[end - 1].kind == "word" else _power_of_word(rest, end)
        if end > 1 and rest[end - 1].text == "/" and rest[end - 2].kind == "word":
            end -= 1
    words = rest[end:]
    if not words or not end:
        return tokens, False, None
    if len(words) == 1 and len(words[0].text) == 1 and words[0].text not in "mgshLlJNWVAKCF":
        return tokens, False, None  # \mathrm{i} is a number
    if any(token.kind == "word" and token.text.lower() in _NO_UNITS for token in words):
        raise Unreadable(" ".join(token.text for token in words))
    return _of_number(rest[:end]), False, _unit(words)


def _of_number(tokens: Tokens) -> Tokens:
    if not tokens or tokens[-1].text in ("+", "-", "/", "^", "_", r"\cdot", r"\times"):
        raise Unreadable("a unit without a number")
    return tokens


def _power_of_word(tokens: Tokens, end: int) -> int:
    """Return the number of tokens of a power that follows a word and ends at `end`; 0 if there is none."""
    texts = [token.text for token in tokens[:end]]
    for size, form in ((2, lambda t: t[0] == "^" and t[1] in "23"), (4, _braced_power), (5, _braced_power)):
        if end > size and form(texts[-size:]) and tokens[end - size - 1].kind == "word":
            return size
    return 0


def _braced_power(texts: Sequence[str]) -> bool:
    return texts[:2] == ["^", "{"] and texts[-1] == "}" and texts[-2] in ("1", "2", "3")


def _unit(words: Tokens) -> str | None:
    power, names = 1, []
    for token in words:
        if token.kind != "word":
            power = int(token.text) if token.text in "23" else power
            if token.text == "/":
                return None
            continue
        lower = token.text.lower()
        powers = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3, "cu": 3}
        if lower in powers:
            power = powers[lower]
        else:
            names.append(lower)
    other = f"({' '.join(name.removesuffix('s') for name in names)})"
    if len(names) != 1:
        return other if names else None
    name = names[0] if names[0] in UNITS else names[0].removesuffix("s")
    if name == "unit":
        return None
    known = UNITS.get(name)
    return other if known is None else known + (f"^{power}" if power > 1 else "")
