r"""Evaluate a formula: exactly where it is rational, else to 400 digits.

A formula with letters is evaluated at three points, which depend on the letters' names only. So two formulas
are the same if their values are, and the work for an answer does not grow with the number of answers that it
is compared with. A formula that cannot be read, or whose value is too large to be worked out, is Unreadable.
"""

import hashlib
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from megatron_dms.evaluation.formula_numbers import (
    CONSTANTS,
    FUNCTIONS,
    MP,
    Unreadable,
    Value,
    added,
    applied,
    binomial,
    divided,
    factorial,
    multiplied,
    power,
    root,
)

POINTS = 3
_SECONDS = 1.0  # for one evaluation of one answer


class Token(NamedTuple):
    """A piece of a formula."""

    kind: str
    """number, letter, command (a function or sign with a name), word, or sign."""
    text: str


_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_FLOORS = {r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", r"\lvert": r"\rvert"}
_PRODUCTS = (r"\cdot", r"\times", "*", r"\ast")
_DIVISIONS = ("/", r"\div")
_ROOTS = (r"\sqrt", r"\root")
_ACCENTS = (r"\overline", r"\bar", r"\vec", r"\hat", r"\tilde", r"\overrightarrow", r"\angle", r"\triangle")
_GREEK = tuple(
    "\\" + name
    for name in (
        *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta"),
        *("kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega"),
        *("Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi", "Psi", "Omega", "ell", "iota"),
    )
)


def evaluate(tokens: Sequence[Token], point: int) -> Value:
    """Return the value of a whole formula at one of the POINTS.

    Raises:
        Unreadable: the tokens are no formula, or its value is too large or undefined.
    """
    reader = _Reader(tokens, point)
    try:
        value = reader.fraction()
    except (ArithmeticError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise Unreadable(str(error)) from error
    if reader.rest:
        raise Unreadable(f"{reader.rest[0].text} is left")
    return value


def letters(tokens: Sequence[Token]) -> bool:
    """Whether a formula may depend on letters."""
    before = ""
    for token in tokens:
        if token.kind in ("letter", "word"):
            if token.text not in CONSTANTS:
                return True
        elif token.text in _GREEK or (token.text in _ACCENTS and before != "number"):
            return True
        before = token.kind
    return False


def _letter(name: str, point: int) -> Value:
    if point < 0:
        raise Unreadable(f"{name} is a letter")
    digest = hashlib.sha256(name.encode()).digest()
    number = Fraction(1009 + int.from_bytes(digest[3 * point : 3 * point + 3], "big") % 4001, 2003)
    return -number if point == 1 else number


class _Reader:
    """Reads a formula by recursive descent, and works out its value on the way."""

    def __init__(self, tokens: Sequence[Token], point: int) -> None:
        self.rest = list(reversed(tokens))  # the next token is the last one
        self.point = point
        self.degrees = 0  # within how many functions: there, a degree is a part of a turn
        self.deadline = time.monotonic() + _SECONDS

    def peek(self, ahead: int = 1) -> str:
        return self.rest[-ahead].text if len(self.rest) >= ahead else ""

    def next(self) -> Token:
        if not self.rest:
            raise Unreadable("the end")
        return self.rest.pop()

    def expect(self, text: str) -> None:
        if self.next().text != text:
            raise Unreadable(f"no {text}")

    def fraction(self) -> Value:
        r"""Read a sum, or two that are divided by TeX's \over."""
        value = self.sum()
        if self.peek() != r"\over":
            return value
        self.next()
        return divided(value, self.sum())

    def sum(self) -> Value:
        if time.monotonic() > self.deadline:
            raise Unreadable("too slow")
        sign = self._sign()
        total = multiplied(sign, self._product())
        while self.peek() in ("+", "-"):
            sign = self._sign()
            total = added(total, multiplied(sign, self._product()))
        return total

    def _sign(self) -> Value:
        sign = Fraction(1)
        while self.peek() in ("+", "-"):
            sign = -sign if self.next().text == "-" else sign
        return sign

    def _product(self) -> Value:
        plain = self.rest[-1].kind == "number" if self.rest else False
        value = self._mixed()
        after_slash = False  # of a/bc nobody knows which part is divided by c
        while self.rest:
            text, kind = self.peek(), self.rest[-1].kind
            if text in _PRODUCTS:
                self.next()
                plain = self.rest[-1].kind == "number" if self.rest else False
                value, after_slash = multiplied(value, multiplied(self._sign(), self._factor())), False
            elif text in _DIVISIONS:
                self.next()
                number = self.rest[-1].kind == "number" if self.rest else False
                value = divided(value, multiplied(self._sign(), self._factor()))
                after_slash = text == "/" and not (plain and number)
                plain = False
            elif kind == "number" or not self._starts_factor():
                return value
            elif after_slash:
                raise Unreadable("a/bc")
            else:
                value, plain = multiplied(value, self._factor()), False
        return value

    def _starts_factor(self) -> bool:
        token = self.rest[-1]
        if token.kind == "letter" or (token.kind == "word" and len(token.text) == 1):
            return True
        known = (r"\frac", r"\binom", r"\pi", *_ROOTS, *_ACCENTS, *_GREEK, *_FLOORS)
        return token.text in known or token.text in _CLOSING or token.text.lstrip("\\") in FUNCTIONS

    def _mixed(self) -> Value:
        """Read the first factor of a product, where 1 1/4 is a mixed number."""
        texts = [token.text for token in reversed(self.rest[-10:])]
        kinds = [token.kind for token in reversed(self.rest[-10:])]
        if kinds[:1] == ["number"] and texts[0].isdigit():
            part = None
            if kinds[1:2] == ["number"] and texts[2:3] == ["/"] and kinds[3:4] == ["number"]:
                part, used = (texts[1], texts[3]), 4
            elif texts[1:3] == [r"\frac", "{"] and texts[4:6] == ["}", "{"] and texts[7:8] == ["}"]:
                part, used = (texts[3], texts[6]), 8
            elif texts[1:2] == [r"\frac"] and kinds[2:3] == ["number"] and len(texts[2]) == 2:
                part, used = (texts[2][0], texts[2][1]), 3
            if part and part[0].isdigit() and part[1].isdigit():
                if int(part[0]) >= int(part[1]) or texts[used : used + 1] in (["^"], ["/"], ["!"]):
                    raise Unreadable("neither a mixed number nor a product")
                del self.rest[-used:]
                return Fraction(int(texts[0])) + Fraction(int(part[0]), int(part[1]))
        return self._factor()

    def _factor(self) -> Value:
        value = self._base()
        while self.rest:
            text = self.peek()
            if text == "^" and self.peek(2) in (r"\circ", "{") and self._degree():
                if not self.degrees:
                    raise Unreadable("a degree within a formula")
                value = multiplied(value, MP.pi / 180)
            elif text == "^":
                self.next()
                value = power(value, self._exponent())
                if self.peek() == "^":
                    raise Unreadable("two exponents")
            elif text == "!":
                self.next()
                if self.peek() == "!":
                    raise Unreadable("a double factorial")
                value = factorial(value)
            else:
                return value
        return value

    def _degree(self) -> bool:
        """Take ^\\circ or ^{\\circ}, if it comes next."""
        for form in (["^", r"\circ"], ["^", "{", r"\circ", "}"]):
            if [token.text for token in self.rest[: -len(form) - 1 : -1]] == form:
                del self.rest[-len(form) :]
                return True
        return False

    def _exponent(self) -> Value:
        if self.peek() in ("-", "+"):
            return multiplied(self._sign(), self._base())
        return self._base()

    def _argument(self) -> Value:
        """Read what a command of LaTeX takes: braces, or one sign, so that \\frac12 is a half."""
        if self.rest and self.rest[-1].kind == "number" and len(self.peek()) > 1:
            number = self.next().text
            if not number.isdigit():
                raise Unreadable("a decimal number without braces")
            self.rest.append(Token("number", number[1:]))
            return Fraction(int(number[0]))
        return self._base()

    def _base(self) -> Value:
        token = self.next()
        text = token.text
        if token.kind == "number":
            return self._number(text)
        if text in _CLOSING:
            value = self.fraction()
            self.expect(_CLOSING[text])
            return value
        if text == "|":
            raise Unreadable("a bar")  # `tokens` gives absolute values as \lvert ... \rvert
        if text in _FLOORS:
            value = self.sum()
            self.expect(_FLOORS[text])
            return self._rounded(text, value)
        name = text.lstrip("\\")
        if name in FUNCTIONS:
            return self._function(name)
        if text == r"\frac":
            top = self._argument()
            return divided(top, self._argument())
        if text == r"\binom":
            return binomial(self._argument(), self._argument())
        if text in _ROOTS:
            return self._square_root(text)
        if text in _ACCENTS:
            return self._accented(text)
        if name in CONSTANTS and self.peek() != "_":
            return CONSTANTS[name]()
        if token.kind == "letter" or (token.kind == "word" and len(text) == 1) or text in _GREEK:
            return _letter(text + self._marks(), self.point)
        raise Unreadable(f"{text} is not known")

    def _marks(self) -> str:
        """Take a subscript and primes, which are parts of a letter's name."""
        marks = ""
        if self.peek() == "_":
            self.next()
            marks = "_"
            if self.peek() == "{":
                while (token := self.next()).text != "}":
                    marks += token.text
                marks = marks.replace("{", "")
            elif self.rest and self.rest[-1].kind == "number":
                number = self.next().text
                marks += number[0]
                if number[1:]:
                    raise Unreadable("a number after a subscript")
            else:
                marks += self.next().text
        while self.peek() == "'":
            marks += self.next().text
        return marks

    def _number(self, text: str) -> Value:
        value = Fraction(text)
        places = len(text.partition(".")[2])
        if self.peek() in (r"\overline", r"\bar", r"\dot") and "." in text:
            repeated = ""
            while self.peek() in (r"\overline", r"\bar", r"\dot"):
                self.next()
                braces = self.peek() == "{"
                if braces:
                    self.next()
                digits = self.next().text
                repeated += digits
                if braces:
                    self.expect("}")
            if not repeated.isdigit() or (self.rest and self.rest[-1].kind == "number"):
                raise Unreadable("no repeating digits")
            value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)
        elif self.peek() == "_":
            raise Unreadable("a base within a formula")
        return value

    def _rounded(self, bracket: str, value: Value) -> Value:
        if bracket == r"\lvert":
            return abs(value)
        if isinstance(value, Fraction):
            down = value.numerator // value.denominator
            return Fraction(down if bracket == r"\lfloor" or down == value else down + 1)
        if isinstance(value, MP.mpc):
            raise Unreadable("a complex number has no floor")
        return Fraction(int(MP.floor(value) if bracket == r"\lfloor" else MP.ceil(value)))

    def _square_root(self, text: str) -> Value:
        degree: Value = Fraction(2)
        if self.peek() == "[" and text == r"\sqrt":
            self.next()
            degree = self.sum()
            self.expect("]")
        return root(self._base(), degree)  # of all digits that follow: nobody means 3 times the root of 1

    def _accented(self, text: str) -> Value:
        if self.peek() != "{":
            token = self.next()
            if token.kind != "letter":
                raise Unreadable("an accent on no letter")
            return _letter(f"{text} {token.text}", self.point)
        self.next()
        name = ""
        while (token := self.next()).text != "}":
            if token.kind != "letter":
                raise Unreadable("an accent on no letters")
            name += token.text
        return _letter(f"{text} {name}", self.point)

    def _function(self, name: str) -> Value:
        base, exponent = None, None
        while self.peek() in ("^", "_"):
            if self.next().text == "_":
                base = self._argument()
            else:
                exponent = self._exponent()
        if exponent == -1 and name in _INVERSE:
            name, exponent = _INVERSE[name], None
        self.degrees += 1
        argument = self._base() if self.peek() in ("(", "[", "{") else self._function_argument()
        self.degrees -= 1
        value = applied(name, argument)
        if base is not None:
            if name != "log":
                raise Unreadable("a subscript of a function")
            value = divided(value, applied("ln", base))
        return value if exponent is None else power(value, exponent)

    def _function_argument(self) -> Value:
        """Read what follows a function without brackets: \\sin 2x, but not the next function."""
        value = multiplied(self._sign(), self._mixed())
        while self.rest and self.rest[-1].kind != "number" and self._starts_factor():
            if self.peek().lstrip("\\") in FUNCTIONS or self.peek() in ("(", "["):
                return value
            value = multiplied(value, self._factor())
        if self.peek() in _DIVISIONS:
            raise Unreadable("a function's argument or its value is divided")
        return value
