"""Tell whether an answer that was read is right, given the data set's answer."""

from collections.abc import Sequence
from fractions import Fraction

from megatron_dms.evaluation.formula_leaves import Leaf
from megatron_dms.evaluation.formula_numbers import (
    MP,
    Unreadable,
    Value,
    added,
    as_float,
    divided,
    multiplied,
    same,
)
from megatron_dms.evaluation.formula_shapes import Group, Named, Relation, Shape

_LEAST_PLACES = 6
_UNORDERED = ("list", "set", "union")


def equal(gold: Shape, answer: Shape) -> bool:
    """Whether `answer` is right, given `gold`; see math_equal in answers.py for the rules."""
    if isinstance(gold, Named) or isinstance(answer, Named):
        return _equal_named(gold, answer)
    if isinstance(gold, Relation):
        return isinstance(answer, Relation) and _equal_relations(gold, answer)
    if isinstance(answer, Relation):
        # m + n = 204 says that the answer is 204; 2x = 204 does not, nor does x^2 + y^2 = 204.
        stated = answer.states and isinstance(gold, Leaf) and gold.constant
        return stated and not same(answer.right.values[0], Fraction(0)) and equal(gold, answer.right)
    if isinstance(gold, Leaf) and isinstance(answer, Leaf):
        return _equal_leaves(gold, answer)
    if isinstance(gold, Group) and isinstance(answer, Group):
        return _equal_groups(gold, answer)
    one, other = (gold, answer) if isinstance(gold, Group) else (answer, gold)
    # {5} is 5.
    return isinstance(one, Group) and one.kind == "set" and len(one.items) == 1 and equal(one.items[0], other)


def _equal_named(gold: Shape, answer: Shape) -> bool:
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.letter and answer.letter and gold.name != answer.name:
            # 2x = y and x = y/2 are one line.
            sides = gold.sides is not None and answer.sides is not None
            return sides and _equal_relations(gold.sides, answer.sides, letters=True)  # type: ignore[arg-type]
        return equal(gold.value, answer.value)
    if isinstance(gold, Named):
        if isinstance(answer, Relation) and answer.sign == "=":
            if gold.sides is not None and _equal_relations(gold.sides, answer):
                return True
        return equal(gold.value, answer)
    assert isinstance(answer, Named)
    if isinstance(gold, Relation):
        return answer.sides is not None and _equal_relations(gold, answer.sides)
    return equal(gold, answer.value)


def _equal_relations(gold: Relation, answer: Relation, letters: bool = False) -> bool:
    """Whether two relations have the same difference of sides, but for a factor."""
    if gold.sign != answer.sign:
        return False
    if letters and (gold.right.constant or answer.right.constant):
        return False  # x = 5 and y = 5
    ratios: list[Value] = []
    try:
        for one, other in zip(_differences(gold), _differences(answer), strict=True):
            ratios.append(divided(one, other))
    except (Unreadable, ArithmeticError):
        return False
    if not all(same(ratio, ratios[0]) for ratio in ratios) or same(ratios[0], Fraction(0)):
        return False
    first = as_float(ratios[0])
    if gold.sign in ("=", r"\ne"):
        return True
    return not isinstance(first, MP.mpc) and first > 0


def _differences(relation: Relation) -> list[Value]:
    pairs = zip(relation.left.values, relation.right.values, strict=True)
    return [added(left, multiplied(Fraction(-1), right)) for left, right in pairs]


def _equal_leaves(gold: Leaf, answer: Leaf) -> bool:
    if (gold.base or 10) != (answer.base or 10):
        return False
    if gold.unit is not None and answer.unit is not None and gold.unit != answer.unit:
        # 5 cm may be called 5 "cm long", but 5 AM is not 5 PM.
        if gold.unit.startswith("(") == answer.unit.startswith("("):
            return False
    factors = [Fraction(1)]
    if gold.percent != answer.percent:
        factors.append(Fraction(100) if answer.percent else Fraction(1, 100))
    return any(_equal_values(gold, answer, factor) for factor in factors)


def _equal_values(gold: Leaf, answer: Leaf, factor: Fraction) -> bool:
    """Whether the answer has the gold's values, or one of both is the other one rounded.

    A `factor` of the gold stands for a per cent sign that one of both has.
    """
    wanted = [value if factor == 1 else multiplied(factor, value) for value in gold.values]
    if all(same(one, other) for one, other in zip(wanted, answer.values, strict=True)):
        return True
    if (gold.places is None) == (answer.places is None) or factor != 1:
        return False
    rounded, exact = (gold, answer) if gold.places is not None else (answer, gold)
    places, value = rounded.places or 0, rounded.values[0]
    if not exact.constant or places < _LEAST_PLACES or abs(value) * 10**places < 10 ** (_LEAST_PLACES - 1):
        return False
    found = as_float(exact.values[0])
    if isinstance(found, MP.mpc) or MP.isinf(found):
        return False
    return bool(abs(found - as_float(value)) <= MP.mpf(10) ** -places / 2)


def _equal_groups(gold: Group, answer: Group) -> bool:
    if gold.inequality and answer.inequality and gold.inequality != answer.inequality:
        return False
    if answer.inequality and not gold.inequality and _may_be_a_point(gold):
        return False  # the inequality 1 < x < 2 is no point (1, 2)
    if answer.kind == "list" and gold.kind == "()":
        return _equal_assignments(gold, answer)
    kinds = {gold.kind, answer.kind}
    if kinds not in ({"list", "set"}, {gold.kind}):
        return False
    one, other = _distinct(gold), _distinct(answer)
    if len(one) != len(other):
        return False
    if gold.kind not in _UNORDERED and not gold.kind.startswith("list"):
        return all(map(equal, one, other))
    left = list(other)
    for item in one:
        found = next((index for index, candidate in enumerate(left) if equal(item, candidate)), None)
        if found is None:
            return False
        del left[found]
    return True


def _equal_assignments(gold: Group, answer: Group) -> bool:
    """Whether x = 3, y = 4 says (3, 4)."""
    named = [item for item in answer.items if isinstance(item, Named) and item.letter]
    if not len(named) == len(answer.items) == len(gold.items) == len({item.name for item in named}):
        return False
    return all(map(equal, gold.items, [item.value for item in sorted(named, key=lambda item: item.name)]))


def _may_be_a_point(gold: Group) -> bool:
    infinite = any(
        isinstance(item, Leaf)
        and not isinstance(item.values[0], (Fraction, MP.mpc))
        and MP.isinf(item.values[0])
        for item in gold.items
    )
    return gold.kind == "()" and not infinite


def _distinct(group: Group) -> Sequence[Shape]:
    """The parts of a group; those of a set once."""
    if group.kind != "set":
        return group.items
    found: list[Shape] = []
    for item in group.items:
        if not any(equal(item, earlier) for earlier in found):
            found.append(item)
    return found
