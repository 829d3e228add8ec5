r"""Split a cleaned formula into tokens, and tell words and units from letters that are multiplied."""

import re
from collections.abc import Sequence
from itertools import pairwise

from megatron_dms.evaluation.formula_numbers import FUNCTIONS, Unreadable
from megatron_dms.evaluation.formula_values import Token

_TOKEN = re.compile(
    r"(?P<number>\d+\.\d+[eE][+-]?\d+|\d+E[+-]?\d+|\d+(?:\.\d*)?|\.\d+)|\\word\{(?P<word>[^{}]*)\}|"
    r"(?P<command>\\(?:begin|end)\s*\{[a-zA-Z]+\*?\}|\\[A-Za-z]+|\\[{}|%\\])|(?P<letters>[A-Za-z]+)|"
    r"(?P<sign><=|>=|!=|\*\*|[^\sA-Za-z\d\\])"
)
_ALIASES = {
    **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac"), r"\frac"),
    **dict.fromkeys((r"\dbinom", r"\tbinom"), r"\binom"),
    **dict.fromkeys((r"\leq", r"\leqslant", r"\leqq", "<="), r"\le"),
    **dict.fromkeys((r"\geq", r"\geqslant", r"\geqq", ">="), r"\ge"),
    **dict.fromkeys((r"\neq", "!="), r"\ne"),
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lt": "<",
    r"\gt": ">",
    r"\vert": "|",
    r"\rvert": "|",
    r"\lvert": "|",
    r"\prime": "'",
    "′": "'",
    "’": "'",
    "**": "^",
    r"\%": "%",
    r"\isin": r"\in",
    r"\varnothing": r"\emptyset",
    r"\langle": "(",
    r"\rangle": ")",
    r"\colon": ":",
    r"\infin": r"\infty",
    r"\tg": r"\tan",
    r"\imath": "i",
    r"\union": r"\cup",
    r"\cr": "\\\\",
    **dict.fromkeys((r"\lor", r"\vee"), "or"),
    **dict.fromkeys((r"\land", r"\wedge"), "and"),
}
_NAMES = {  # of bare text
    "pi": r"\pi",
    "sqrt": r"\root",
    "inf": r"\infty",
    "infty": r"\infty",
    "infinity": r"\infty",
    "and": "and",
    "or": "or",
    "union": r"\cup",
    "frac": r"\frac",
}
UNITS = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "in": "in inch inche",
        "ft": "ft foot feet",
        "yd": "yd yard",
        "mi": "mi mile",
        "g": "g gram",
        "mg": "mg milligram",
        "kg": "kg kilogram",
        "lb": "lb pound",
        "oz": "oz ounce",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "day": "day",
        "week": "week",
        "month": "month",
        "year": "year yr",
        "mph": "mph",
        "cent": "cent",
        "dollar": "dollar usd",
        "degree": "degree deg",
        "radian": "radian rad",
        "liter": "l liter litre",
        "ml": "ml milliliter millilitre",
        "gallon": "gallon gal",
        "volt": "v",
        "joule": "j",
        "newton": "n",
        "watt": "w",
        "kelvin": "k",
    }.items()
    for name in names.split()
}
_LITTLE_WORDS = ("per", "sq", "cu")
_VOWEL = re.compile(r"[aeiouy]")


def tokens_of(text: str) -> list[Token]:
    """Return the tokens of a cleaned text."""
    tokens: list[Token] = []
    end = 0
    for found in _TOKEN.finditer(text):
        if text[end : found.start()].strip():
            raise Unreadable(text[end : found.start()].strip())
        end = found.end()
        if found["number"]:
            tokens += _number(found["number"])
        elif found["word"]:
            tokens.append(_word(found["word"]))
        elif found["letters"]:
            tokens += _letters(
                found["letters"], after_space=found.start() > 0 and text[found.start() - 1] == " "
            )
        elif found["command"]:
            name = re.sub(r"\s", "", found["command"])
            name = _ALIASES.get(name, name)
            if name == r"\degree":
                tokens += [Token("sign", "^"), Token("command", r"\circ")]
            else:
                tokens.append(Token("letter" if len(name) == 1 else "command", name))
        else:
            tokens.append(Token("sign", _ALIASES.get(found["sign"], found["sign"])))
    if text[end:].strip():
        raise Unreadable(text[end:].strip())
    return _with_absolute_values(tokens)


def _number(text: str) -> list[Token]:
    mantissa, mark, exponent = re.fullmatch(r"([\d.]+)([eE]?)(.*)", text).groups()  # type: ignore[union-attr]
    if not mark:
        return [Token("number", text)]
    signs = [Token("sign", sign) for sign in exponent if sign in "+-"]
    power = Token("number", exponent.lstrip("+-"))
    return [
        Token("number", mantissa),
        Token("command", r"\times"),
        Token("number", "10"),
        Token("sign", "^"),
        *signs,
        power,
    ]


def _word(text: str) -> Token:
    lower = text.lower()
    if lower in ("and", "or"):
        return Token("command", lower)
    if lower in FUNCTIONS or lower in ("pi", "sqrt"):
        return Token("command", _NAMES.get(lower, "\\" + lower))
    return Token("word", text)


def _letters(run: str, after_space: bool) -> list[Token]:
    """Read letters that no command marks: names of functions, words, or letters that are multiplied."""
    if run in _NAMES or run in FUNCTIONS:
        return [Token("command", _NAMES.get(run, "\\" + run))]
    steps = {ord(b) - ord(a) for a, b in pairwise(run)}
    spelled = (
        len(run) >= 4 and steps != {1} and len(set(run)) > 2 and _VOWEL.search(run) and run[1:].islower()
    )
    if run in _LITTLE_WORDS and after_space:
        return [Token("word", run)]
    if spelled or (len(run) > 1 and after_space and run.lower().rstrip("s") in UNITS):
        return [Token("word", run)]
    for name in sorted(FUNCTIONS, key=len, reverse=True):  # xsin, from x\sin without its backslash
        if len(run) > len(name) and run.endswith(name):
            return [*(Token("letter", letter) for letter in run[: -len(name)]), Token("command", "\\" + name)]
    return [Token("letter", letter) for letter in run]


def _with_absolute_values(tokens: Sequence[Token]) -> list[Token]:
    """Tell the bar that opens an absolute value from the one that closes it."""
    found: list[Token] = []
    opened = 0
    for token in tokens:
        if token.text != "|" or token.kind == "word":
            found.append(token)
            continue
        before = found[-1] if found else Token("sign", "(")
        operand = before.kind in ("number", "letter", "word") or before.text in (
            ")",
            "]",
            "}",
            r"\rvert",
            "!",
            r"\pi",
        )
        opens = not (opened and operand)
        opened += 1 if opens else -1
        found.append(Token("command", r"\lvert" if opens else r"\rvert"))
    if opened:
        raise Unreadable("a bar")
    return found
