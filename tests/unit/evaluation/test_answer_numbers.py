"""Whole numbers as answers."""

import pytest

from megatron_dms.evaluation.answer_numbers import integer_answer

INTEGERS = [
    (r"\boxed{204\ \text{sq. units}}", 204),
    (r"\boxed{\text{Answer: } 204}", 204),
    ("The answer is n = 204.", 204),
    ("The answer is 20 4", None),
    ("The answer is $203$ or $204$", None),
    (r"\boxed{\mathbf{204}}", 204),
    (r"\boxed{\textstyle 204}", 204),
    (r"\boxed{\color{blue}{204}.}", 204),
    (r"\boxed{(204)}", 204),
    (r"\boxed{204 people}", 204),
    (r"\boxed 204.", 204),
    (r"\boxed{２０４}", 204),
    (r"The answer is $\textbf{204}$.", 204),
    (r"\boxed{2 04}", None),
    (r"\boxed{204!}", None),
    (r"\boxed{204\%}", None),
    (r"The answer is $204$%.", None),
    ("The answer is 204 percent.", None),
    ("The answer is 2:04", None),
    ("The answer is 200 to 204", None),
    ("The answer is 204. The answer is correct.", 204),
    (r"\boxed{203}, \boxed{204}", None),
    (r"\boxed{204} = \boxed{204}", 204),
    (r"<think>\boxed{204}, no", None),
    (r"[THINK]\boxed{203}[/THINK]\boxed{204}", 204),
    (r"\boxed{203}</think>\boxed{204}", 204),
    (r"\boxed{073}", 73),
    (r"\boxed{000}", 0),
    (r"\boxed{999}", 999),
    (r"\boxed{ n = 73 }", 73),
    (r"\boxed{\text{33}}", 33),
    (r"\boxed{12}, no: \boxed{13}", 13),
    ("The answer is 042.", 42),
    ("Final answer: **7**", 7),
    ("The answer is 3, no: the answer is $4$", 4),
    (r"\boxed{1000}", None),
    (r"\boxed{1,000}", None),
    (r"\boxed{-5}", None),
    (r"\boxed{204^\circ}", 204),
    (r"\boxed{$204^{\circ}$}", 204),
    (r"\boxed{204°}", 204),
    (r"\boxed{m+n=204}", 204),
    (r"\boxed{m + n = 100 + 104 = 204}", 204),
    (r"\boxed{f(1, 2) = 204}", 204),
    (r"\boxed{204\text{ cm}}", 204),
    (r"\boxed{204\,\mathrm{cm}^2}", 204),
    (r"\boxed{73.0}", 73),
    (r"Answer: \(204\)", 204),
    (r"The answer is $204^\circ$.", 204),
    ("The answer is 73.0", 73),
    (r"\boxed{7.05}", None),
    (r"\boxed{n \leq 204}", None),
    (r"\boxed{n <= 204}", None),
    (r"\boxed{n \not= 204}", None),
    (r"\boxed{m = 3, n = 204}", None),
    (r"\boxed{m = 3\text{ and }n = 204}", None),
    (r"\boxed{204 = m + n}", None),
    (r"\boxed{203\text{ or }204}", None),
    (r"\boxed{3\text{ dozen}}", None),
    (r"\boxed{2^\circ 3}", None),
    (r"\boxed{\text{cm}}", None),
    (r"Answer: $2^{10}$", None),
    ("the answer is 73.05", None),
    (r"\boxed{\frac{14}{2}}", None),
    (r"\boxed{x}", None),
    (r"the answer is 5, or \boxed{}", None),
    ("the answer is 3.5", None),
    ("the answer is 12/5", None),
    ("there are 12", None),
]


@pytest.mark.parametrize(("text", "value"), INTEGERS)
def test_integer_answer(text: str, value: int | None) -> None:
    """Catches: octal or refused leading zeros, part of a decimal number, a number merely mentioned, a right
    answer refused for its unit, sum or zeros, one of several numbers taken."""
    assert integer_answer(text) == value


def test_integer_range() -> None:
    """Catches: bounds that are not looked at, or a sign or separators that are dropped."""
    assert integer_answer(r"\boxed{-5}", low=-10) == -5
    assert integer_answer(r"\boxed{1{,}234}", high=2000) == 1234
    assert integer_answer("The answer is 1,234.", high=2000) == 1234
