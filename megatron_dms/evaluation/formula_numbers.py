"""Numbers of formulas: rational ones exactly, others to 400 digits, and none that takes long to work out."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

_MOST_BITS = 400_000
_MOST_DENOMINATOR_BITS = 100_000
_MOST_EXPONENT = 1_000_000  # of e, in a value that is not rational
_MOST_FACTORIAL = 5000

type Value = Fraction | Any
"""Exact, or a number of mpmath."""


class Unreadable(Exception):
    """The text is no formula of the kinds that are read here."""


def _context() -> Any:
    context = mpmath.MPContext()
    context.dps = 400
    return context


MP = _context()
_CLOSE = MP.mpf(10) ** -350

CONSTANTS: dict[str, Callable[[], Any]] = {
    "pi": lambda: +MP.pi,
    "e": lambda: +MP.e,
    "i": lambda: MP.mpc(0, 1),
}
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sin": MP.sin,
    "cos": MP.cos,
    "tan": MP.tan,
    "cot": MP.cot,
    "sec": MP.sec,
    "csc": MP.csc,
    "arcsin": MP.asin,
    "arccos": MP.acos,
    "arctan": MP.atan,
    "sinh": MP.sinh,
    "cosh": MP.cosh,
    "tanh": MP.tanh,
    "ln": MP.log,
    "log": MP.log,
    "exp": MP.exp,
}


def same(one: Value, other: Value) -> bool:
    """Whether two values are equal; relative to their size, so that small numbers differ, too."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    a, b = as_float(one), as_float(other)
    if MP.isinf(a) or MP.isinf(b):
        return bool(a == b)
    return bool(abs(a - b) <= _CLOSE * max(abs(a), abs(b)))


def as_float(value: Value) -> Any:
    if isinstance(value, Fraction):
        return MP.mpf(value.numerator) / value.denominator
    return value


def _checked(value: Value) -> Value:
    if isinstance(value, Fraction):
        bits = value.denominator.bit_length()
        if bits > _MOST_DENOMINATOR_BITS or value.numerator.bit_length() > _MOST_BITS:
            raise Unreadable("too large")
    elif not (MP.isfinite(value) if not isinstance(value, MP.mpc) else MP.isfinite(value.real)):
        raise Unreadable("not finite")
    return value


def added(one: Value, other: Value) -> Value:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _checked(one + other)
    a, b = as_float(one), as_float(other)
    total = a + b
    return Fraction(0) if abs(total) <= _CLOSE * max(abs(a), abs(b)) else _checked(total)


def multiplied(one: Value, other: Value) -> Value:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _checked(one * other)
    return _checked(as_float(one) * as_float(other))


def divided(one: Value, other: Value) -> Value:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _checked(one / other)
    return _checked(as_float(one) / as_float(other))


def power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base not in (0, 1, -1) and bits * abs(exponent.numerator) > _MOST_BITS:
            raise Unreadable("too large")
        if base in (1, -1):
            return base if exponent.numerator % 2 else Fraction(1)
        return _checked(base ** int(exponent))
    if base == 0:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise Unreadable("a power of 0")
    size = abs(as_float(exponent)) * (abs(MP.log(abs(as_float(base)))) + 1)
    if size > _MOST_EXPONENT:
        raise Unreadable("too large")
    return _tidy(MP.power(as_float(base), as_float(exponent)))


def _tidy(value: Any) -> Value:
    """Drop parts that are only left over from rounding."""
    if not isinstance(value, MP.mpc):
        return _checked(value)
    if abs(value.imag) <= _CLOSE * abs(value.real):
        return _checked(value.real)
    return _checked(MP.mpc(0, value.imag) if abs(value.real) <= _CLOSE * abs(value.imag) else value)


def root(value: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 10_000:
        return power(value, divided(Fraction(1), degree))
    n = int(degree)
    if isinstance(value, Fraction) and value < 0 and n % 2:
        return -root(-value, degree)  # the real root, as usual
    found = power(value, Fraction(1, n)) if value != 0 else Fraction(0)
    if isinstance(value, Fraction) and value > 0 and value.denominator.bit_length() < 1200:
        near = [
            Fraction(int(MP.nint(power(Fraction(part), Fraction(1, n))))) for part in value.as_integer_ratio()
        ]
        if power(near[0], degree) == value.numerator and power(near[1], degree) == value.denominator:
            return near[0] / near[1]
    return found


def applied(name: str, value: Value) -> Value:
    if name == "exp":
        return power(CONSTANTS["e"](), value)
    if name in ("ln", "log") and value == 0:
        raise Unreadable("logarithm of 0")
    found = FUNCTIONS[name](as_float(value))
    if isinstance(found, MP.mpc):
        return _tidy(found)
    if name in ("sin", "cos", "tan", "cot") and abs(found) < _CLOSE:
        return Fraction(0)
    if abs(found) > 1 / _CLOSE:
        raise Unreadable("not finite")
    return _checked(found)


def factorial(value: Value) -> Value:
    """n!, for whole numbers that are not too large."""
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _MOST_FACTORIAL:
        raise Unreadable("no factorial")
    return Fraction(math.factorial(int(value)))


def binomial(top: Value, bottom: Value) -> Value:
    if not (isinstance(top, Fraction) and isinstance(bottom, Fraction)):
        raise Unreadable("no binomial coefficient")
    n, k = int(top), int(bottom)
    if n != top or k != bottom or not 0 <= k <= n <= _MOST_FACTORIAL:
        raise Unreadable("no binomial coefficient")
    product = Fraction(1)
    for index in range(min(k, n - k)):
        product = product * (n - index) / (index + 1)
    return product
