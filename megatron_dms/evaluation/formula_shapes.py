r"""Read an answer as a whole: a formula, a list, a tuple, a set, intervals, a matrix, an equation.

Nothing is left over: an answer that holds anything else is Unreadable, and no number is picked out of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dms.evaluation.formula_leaves import Leaf, Tokens, leaf
from megatron_dms.evaluation.formula_numbers import Unreadable
from megatron_dms.evaluation.formula_tokens import tokens_of
from megatron_dms.evaluation.formula_values import Token, letters


@dataclass(frozen=True)
class Group:
    """Several answers: "list", "set", "union", "ratio", a pair of brackets "()", "[)", or "matrix 2".

    `inequality` names the letter if an interval was written as an inequality.
    """

    kind: str
    items: tuple["Shape", ...]
    inequality: str | None = None


@dataclass(frozen=True)
class Named:
    """name = value. A name is a letter, or something like f(x), AB or m + n."""

    name: str
    letter: bool
    value: "Shape"
    sides: "Relation | None" = None


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that is not solved for a letter."""

    sign: str
    left: Leaf
    right: Leaf
    states: bool = False
    """Whether the left side adds or multiplies letters, as in m + n = 204, and the right side is a number."""


type Shape = Leaf | Group | Named | Relation

_OPEN = ("(", "[", r"\{", "{", r"\lvert", r"\lfloor", r"\lceil")
_CLOSE = (")", "]", r"\}", "}", r"\rvert", r"\rfloor", r"\rceil")
SIGNS = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
SEPARATORS = (",", ";", "and", "or")


def read(text: str) -> Shape:
    """Read a cleaned text.

    Raises:
        Unreadable: the text holds something that is not read here.
    """
    if len(text) > 2000:
        raise Unreadable("long")
    try:
        return _list(tokens_of(text))
    except RecursionError as error:
        raise Unreadable("deep") from error


def split(tokens: Tokens, signs: Sequence[str]) -> tuple[list[list[Token]], list[str]]:
    """Split at signs that no bracket encloses; return the parts and the signs."""
    parts: list[list[Token]] = [[]]
    found: list[str] = []
    depth = 0
    for token in tokens:
        opens = token.text in _OPEN or token.text.startswith(r"\begin")
        depth += opens - (token.text in _CLOSE or token.text.startswith(r"\end"))
        if depth == 0 and token.text in signs and token.kind != "word" and not opens:
            parts.append([])
            found.append(token.text)
        else:
            parts[-1].append(token)
    if depth:
        raise Unreadable("brackets")
    return parts, found


def _list(tokens: Tokens) -> Shape:
    parts, signs = split(tokens, SEPARATORS)
    if any(not part for part, sign in zip(parts, [*signs, ""], strict=True) if sign in (",", ";")):
        raise Unreadable("an empty part")
    items = [item for part in parts if part for item in _both_signs(part)]
    if not items:
        raise Unreadable("nothing")
    if len(items) == 1:
        return _relation(items[0])
    shapes = [_relation(item) for item in items]
    if any(isinstance(shape, Group) and shape.inequality for shape in shapes):
        if "or" in signs and all(isinstance(shape, Group) and shape.inequality for shape in shapes):
            names = {shape.inequality for shape in shapes if isinstance(shape, Group)}
            return Group("union", tuple(shapes), names.pop() if len(names) == 1 else None)
        return Group("list " + " ".join(sorted(set(signs))), tuple(shapes))
    return Group("list", _without_names(shapes))


def _without_names(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Drop the name of x = 1 or x = 2, and of x = 1, 2."""
    first = shapes[0]
    if not isinstance(first, Named):
        return tuple(shapes)
    if all(isinstance(shape, Named) and shape.name == first.name for shape in shapes):
        return tuple(shape.value for shape in shapes if isinstance(shape, Named))
    if not any(isinstance(shape, (Named, Relation)) for shape in shapes[1:]):
        return (first.value, *shapes[1:])
    return tuple(shapes)


def _both_signs(tokens: list[Token]) -> list[list[Token]]:
    r"""Write 1 \pm 2 as 1 + 2 and 1 - 2."""
    signs = [token.text for token in tokens if token.text in (r"\pm", r"\mp")]
    if not signs:
        return [tokens]
    if len(signs) > 1 or any(token.text == "," for token in tokens):
        raise Unreadable("several signs")
    return [
        [Token("sign", sign) if token.text in (r"\pm", r"\mp") else token for token in tokens]
        for sign in "+-"
    ]


def _relation(tokens: Tokens) -> Shape:
    exact, _ = split(tokens, (r"\approx",))
    if len(exact) == 2 and exact[0] and all(exact):
        tokens = exact[0]  # the right side only says how large the left one is
    parts, signs = split(tokens, SIGNS)
    if not signs:
        return _union(tokens)
    if not all(parts):
        raise Unreadable("a side is missing")
    if set(signs) == {"="}:
        if len(signs) > 1 and any(letters(part) for part in parts[1:-1]):
            raise Unreadable("a chain of equations")
        return _equation(parts[0], parts[-1])
    if signs == [r"\in"]:
        return Named(_name(parts[0]), _is_letter(parts[0]), _union(parts[1]))
    if r"\in" in signs or "=" in signs:
        raise Unreadable("several relations")
    if all(_constant(part) for part in (parts[0], parts[-1])) and len(signs) == 2 and _is_letter(parts[1]):
        low, high = signs[0], signs[1]
        if low in ("<", r"\le") and high in ("<", r"\le"):
            return _interval(parts[0], low, parts[1], high, parts[2])
        if low in (">", r"\ge") and high in (">", r"\ge"):
            return _interval(parts[2], _TURNED[high], parts[1], _TURNED[low], parts[0])
    if len(signs) > 1:
        raise Unreadable("several inequalities")
    if _constant(parts[0]) and _is_letter(parts[1]) and signs[0] in _TURNED:
        parts, signs = parts[::-1], [_TURNED[signs[0]]]
    if _is_letter(parts[0]) and _constant(parts[1]) and signs[0] in _TURNED:
        infinity = [Token("command", r"\infty")]
        if signs[0] in ("<", r"\le"):
            return _interval([Token("sign", "-"), *infinity], "<", parts[0], signs[0], parts[1])
        return _interval(parts[1], _TURNED[signs[0]], parts[0], "<", infinity)
    if signs[0] in (">", r"\ge"):
        parts, signs = parts[::-1], [_TURNED[signs[0]]]
    return Relation(signs[0], leaf(parts[0]), leaf(parts[1]))


def _interval(low: Tokens, first: str, letter: Tokens, second: str, high: Tokens) -> Group:
    brackets = ("[" if first == r"\le" else "(") + ("]" if second == r"\le" else ")")
    return Group(brackets, (leaf(low), leaf(high)), _name(letter))


def _constant(tokens: Tokens) -> bool:
    return not letters(tokens)


def _is_letter(tokens: Tokens) -> bool:
    named = bool(tokens) and (
        tokens[0].kind == "letter" or (tokens[0].kind == "word" and len(tokens[0].text) == 1)
    )
    greek = bool(tokens) and tokens[0].kind == "command" and letters(tokens[:1])
    return (named or greek) and (len(tokens) == 1 or (tokens[1].text == "_" and letters(tokens)))


def _name(tokens: Tokens) -> str:
    return "".join(token.text for token in tokens).replace("{", "").replace("}", "")


def _equation(left: Tokens, right: Tokens) -> Shape:
    name = _name(left)
    tuple_of_letters = re.fullmatch(r"\([A-Za-z](?:,[A-Za-z])+\)", name)
    if not _constant(left) and _is_letter(left):
        value = _union(right)
        try:
            return Named(name, True, value, Relation("=", leaf(left), leaf(right)))
        except Unreadable:
            return Named(name, True, value)
    words = any(token.kind == "word" and len(token.text) > 1 for token in left)
    function = re.fullmatch(r"\\?[A-Za-z]+'*(?:_\w)?\((?:\\?[A-Za-z]|-?\d+)(?:,-?\w+)*\)", name)
    segment = re.fullmatch(
        r"[A-Z]{2,}|\[[A-Z]+\]|\|[A-Z]+\||\\(?:angle|triangle|overline|overrightarrow)[A-Z]+", name
    )
    if words or function or segment or tuple_of_letters:
        return Named(name, False, _union(right))
    if _constant(left):
        return _union(right)  # 2 + 3 = 5
    named = {token.text for token in left if token.kind == "letter"}
    plain = all(token.kind == "letter" or token.text in ("+", "-", r"\cdot", "*") for token in left)
    return Relation("=", leaf(left), leaf(right), plain and len(named) > 1 and _constant(right))


def _union(tokens: Tokens) -> Shape:
    parts, signs = split(tokens, (r"\cup",))
    if not signs:
        return _brackets(tokens)
    shapes = [_brackets(part) for part in parts]
    if not all(isinstance(shape, Group) for shape in shapes):
        raise Unreadable("a union of something else")
    return Group("union", tuple(shapes))


def _brackets(tokens: Tokens) -> Shape:
    if not tokens:
        raise Unreadable("nothing")
    first, last = tokens[0].text, tokens[-1].text
    if [first] == [token.text for token in tokens] == [r"\emptyset"]:
        return Group("set", ())
    if first.startswith(r"\begin"):
        return _matrix(tokens)
    if first in ("(", "[", r"\{", "{") and last in (")", "]", r"\}", "}") and enclosed(tokens):
        inner = tokens[1:-1]
        parts, signs = split(inner, (",", ";"))
        if first == r"\{" or last == r"\}":
            if (first, last) != (r"\{", r"\}"):
                raise Unreadable("brackets")
            return _set(inner)
        if signs:
            items = tuple(_brackets(part) for part in parts)
            return Group(_open(first) + last.replace("}", ")"), items)
        if first + last in ("()", "[]", "{}"):
            return _list(inner) if _is_shape(inner) else leaf(tokens)
        raise Unreadable("brackets")
    parts, signs = split(tokens, (":",))
    if signs:
        if any(token.kind == "word" for token in tokens):
            raise Unreadable("a time of day")
        return Group("ratio", tuple(leaf(part) for part in parts))
    return leaf(tokens)


def _open(bracket: str) -> str:
    return "(" if bracket == "{" else bracket


def _is_shape(inner: Tokens) -> bool:
    """Whether brackets hold more than a formula: a matrix, a set or a relation."""
    return bool(inner) and (
        inner[0].text.startswith(r"\begin") or inner[0].text == r"\{" or any(t.text in SIGNS for t in inner)
    )


def enclosed(tokens: Tokens) -> bool:
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token.text in _OPEN) - (token.text in _CLOSE)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _set(inner: Tokens) -> Shape:
    if not inner:
        return Group("set", ())
    parts, _ = split(inner, (",", ";"))
    return Group("set", tuple(_relation(item) for part in parts for item in _both_signs(part)))


def _matrix(tokens: Tokens) -> Shape:
    found = re.fullmatch(r"\\begin\{(p|b|v|V|B|small)?(?:matrix|array)\}", tokens[0].text)
    if found is None or tokens[-1].text != tokens[0].text.replace("begin", "end", 1):
        raise Unreadable(tokens[0].text)
    inner = list(tokens[1:-1])
    if "array" in tokens[0].text and inner and inner[0].text == "{":
        del inner[: [token.text for token in inner].index("}") + 1]
    if any(token.text.startswith((r"\begin", r"\hline")) for token in inner):
        raise Unreadable("a matrix within a matrix")
    rows = [split(row, ("&",))[0] for row in split(inner, ("\\\\",))[0]]
    if rows and rows[-1] == [[]]:
        rows.pop()
    if not rows or len({len(row) for row in rows}) > 1:
        raise Unreadable("rows of different lengths")
    kind = "determinant" if found[1] in ("v", "V") else "matrix"
    return Group(f"{kind} {len(rows)}", tuple(leaf(cell) for row in rows for cell in row))
