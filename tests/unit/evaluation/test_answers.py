"""Mathematical answers found in text, and which answers are the same."""

import itertools
import random
import threading
import time

import pytest

from megatron_dms.evaluation.answers import (
    MathAnswer,
    answer_classes,
    math_answer,
    math_equal,
    math_gold,
)

EQUAL = [
    ("5", "The answer is 5 cm."),
    ("3/2", "The answer is 1 1/2."),
    (r"\text{6:30 PM}", r"\boxed{\text{6:30 p.m.}}"),
    (r"5 \text{ cm}", r"\boxed{5 \text{ units}}"),
    (r"5 \text{ cm}", r"\boxed{5 \text{ cm long}}"),
    ("43_6", r"\boxed{43 \text{ in base } 6}"),
    ("43_6", r"\boxed{(43)_{\text{base }6}}"),
    ("1, 3", r"\boxed{x = 1 \lor x = 3}"),
    (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\boxed{\begin{bmatrix} 1 \cr 3 \end{bmatrix}}"),
    ("1, -2", r"\boxed{1} and \boxed{-2}"),
    ("1, -2", r"Either $x = \boxed{1}$ or $x = \boxed{-2}$."),
    ("(1, 2), (3, 4)", "\\[\\boxed{(3, 4)}\\]\n and \n\\[\\boxed{(1, 2)}\\]"),
    ("2", r"\boxed{1}, \boxed{2}, so the sum of both is \boxed{3}, less one: \boxed{2}"),
    ("7", r"\boxed{7}. \boxed{7}"),
    ("7", r"<think>\boxed{8}</think>\boxed{7}"),
    ("7", "The answer is $\\mathbf{7}$, as claimed."),
    ("9/4", r"\boxed{2\ 1/4}"),
    ("9/4", r"\boxed{2¼}"),
    (r"\frac{5}{11}", r"\boxed{0.\overline{45}}"),
    (r"\frac{5}{6}", r"\boxed{0.8\overline{3}}"),
    (r"\frac{\pi}{6}", r"\boxed{\pi/6\approx 0.52}"),
    ("43_6", r"\boxed{43_{\text{six}}}"),
    ("43_6", r"\boxed{43 \text{ base } 6}"),
    ("2 - 3i", r"\boxed{-3\mathit{i} + 2}"),
    ("(2, 5)", r"\boxed{x = 2, y = 5}"),
    ("x^2 - y = 3", r"\boxed{y = x^2 - 3}"),
    (r"\frac{1}{2}", r"\boxed{{1 \over 2}}"),
    (r"\pi", r"\boxed{3.141593}"),
    ("5", r"\boxed{m + n = 5}"),
    (r"[2, \infty)", r"\boxed{x \ge 2}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    ("1/2", r"I get \boxed{\dfrac12}."),
    (r"$\frac{2}{4}$", r"\boxed{1/2}"),
    ("5", r"\boxed{5\text{ cm}}"),
    (r"12 \text{ m}^2", r"\boxed{12}"),
    (r"\{1, 2, 3\}", r"\boxed{3, 1, 2}"),
    ("1, 3", r"\boxed{1 \text{ and } 3}"),
    (r"(-\infty, 3] \cup [5, \infty)", r"\boxed{(-\infty,3]\cup[5,\infty)}"),
    ("[0,1)", r"\boxed{\left[0, 1\right)}"),
    ("1<x<2", r"\boxed{(1,2)}"),
    (r"50\%", r"\boxed{0.5}"),
    (r"50\%", r"\boxed{50}"),
    ("1234567", r"\boxed{1,234,567}"),
    ("1234", r"\boxed{1{,}234}"),
    ("1234567", r"\boxed{1\,234\,567}"),
    ("10000", r"\boxed{10 000}"),
    (r"\$18.90", r"\boxed{18.9}"),
    ("x=5", r"\boxed{5}"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
    ("42", "So the answer is 42, as claimed."),
    (r"\boxed{42}", "Of the 7 numbers, $40 + 2 = 42$ is right."),
]
DIFFERENT = [
    ("9", "The answer is 9 cats and 10 dogs."),
    ("7", "The answer is 7:30."),
    ("e^{-50}", r"\boxed{e^{-51}}"),
    (r"\pi \cdot 10^{-20}", r"\boxed{2\pi \cdot 10^{-20}}"),
    ("43_6", r"\boxed{27_{10}}"),
    ("43_6", r"\boxed{27}"),
    (r"\frac{3}{4}", r"\boxed{1{\frac{3}{4}}}"),
    (r"\text{6:30 PM}", r"\boxed{\text{6:30 AM}}"),
    (r"5 \text{ PM}", r"\boxed{5 \text{ AM}}"),
    ("3", r"\boxed{3}, \boxed{4}"),
    ("3", r"\boxed{3 \text{ or } 4}"),
    ("3", r"\boxed{\lnot 3}"),
    ("3", r"\boxed{3 \pmod 7}"),
    ("3", r"\boxed{3 \text{ dozen}}"),
    ("3", r"\boxed{\text{at least } 3}"),
    ("10", r"\boxed{9 \text{ ft } 10 \text{ in}}"),
    (r"\{x \mid x > 2\}", r"\boxed{\{x \mid x > 3\}}"),
    ("10^{-30}", r"\boxed{0}"),
    (r"\frac{1}{300!}", r"\boxed{\frac{1}{301!}}"),
    ("2^{900}", r"\boxed{2^{900} + 1}"),
    (r"\pi", r"\boxed{3.14159}"),
    (r"\frac{1}{4}", r"\boxed{2 1/4}"),
    ("43_6", r"\boxed{43_7}"),
    ("43_6", r"\boxed{43}"),
    ("43", r"\boxed{43_6}"),
    ("2", r"\boxed{2 - 3\mathrm{i}}"),
    ("5 \\text{ cm}", r"\boxed{5 \text{ m}}"),
    ("x = 5", r"\boxed{y = 5}"),
    ("5", r"\boxed{-x = 5}"),
    ("9", r"\boxed{x^2 + y^2 = 9}"),
    ("(1, 2)", r"\boxed{1 < x < 2}"),
    ("(2, 5)", r"\boxed{x = 5, y = 2}"),
    (r"\frac{a}{bc}", r"\boxed{a/bc}"),
    ("|x|", r"\boxed{x}"),
    (r"\frac{1}{3}", r"\boxed{0.33}"),
    ("[0,1]", r"\boxed{(0,1)}"),
    (r"\{1, 2\}", r"\boxed{\{1, 2, 3\}}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("1234", r"\boxed{1, 234}"),
    ("-3", r"\boxed{3}"),
    ("x^2", r"\boxed{y^2}"),
    (r"\text{Evelyn}", r"\boxed{\text{Carla}}"),
    ("3", r"\boxed{3}, no: \boxed{4}"),
]


@pytest.mark.parametrize(("gold", "text"), EQUAL)
def test_equal_mathematics(gold: str, text: str) -> None:
    """Catches: a gold answer that is read as prose (the number 2 of "2 sqrt 3"), groups of digits summed."""
    answer = math_answer(text)
    assert answer is not None and math_equal(math_gold(gold), answer)


@pytest.mark.parametrize(("gold", "text"), DIFFERENT)
def test_different_mathematics(gold: str, text: str) -> None:
    """Catches: a comparison that says yes to all, or to any of several boxes; a list taken for a number."""
    answer = math_answer(text)
    assert answer is not None and not math_equal(math_gold(gold), answer)


def test_no_mathematics() -> None:
    """Catches: an empty box or an empty text as an answer, with which cut chains would win votes."""
    assert [math_answer(text) for text in ("", "I do not know.", r"\boxed{}", r"3, so \boxed{ }")] == [
        None
    ] * 4
    with pytest.raises(ValueError, match="the data set's answer ' ' is empty"):
        math_gold(" ")
    unreadable = math_answer(r"\boxed{???}")
    assert unreadable is not None and math_equal(unreadable, unreadable)
    assert math_equal(MathAnswer("a", ()), MathAnswer("a", ()))


def test_comparison_is_limited() -> None:
    """Catches: a limit that is not passed on: these take minutes, or memory without end."""
    start = time.perf_counter()
    one, other = math_answer(r"\boxed{9^{9^{9}}}"), math_answer(r"\boxed{7}")
    assert one is not None and other is not None and not math_equal(one, other)
    assert time.perf_counter() - start < 4


def test_a_vote_over_unreadable_answers_takes_no_time() -> None:
    """Catches: an answer that is worked out anew for each pair, or that is too large to be worked out."""
    start = time.perf_counter()
    texts = [rf"\boxed{{{n}^{{9^{{9^{{9}}}}}}}}" for n in range(30)] + [r"\boxed{7}"] * 30
    texts += [rf"\boxed{{({n} + 2^{{99999}})!}}" for n in range(10)] + [r"\boxed{e^{e^{e^{e^{e}}}}}"] * 10
    classes = answer_classes([math_answer(text) for text in texts], math_equal)
    assert classes[30:60] == [30] * 30 and classes[70:] == [70] * 10
    assert len(set(classes[2:30] + classes[60:70])) == 38
    assert time.perf_counter() - start < 10


def test_other_threads_are_refused() -> None:
    """Catches: the docstring, once Math-Verify does without signals; an answer lost silently in a thread.
    Boxes need no Math-Verify."""
    raised: list[BaseException] = []
    boxed: list[MathAnswer | None] = []

    def work() -> None:
        try:
            boxed.append(math_answer(r"\boxed{1}"))
            math_answer("So 1 it is.")
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "thread" in str(raised[0]) and boxed == [math_answer(r"\boxed{1}")]


def test_classes_of_mathematics() -> None:
    """Catches: a vote by text, and one that only compares with the gold's side first."""
    texts = ["0.5", "1/2", r"\frac{3}{6}", "", "7", "(1,2)", "1<x<2"]
    answers = [math_answer(rf"\boxed{{{text}}}") for text in texts]
    assert answer_classes(answers, math_equal) == [0, 0, 0, None, 4, 5, 5]


def test_classes_without_transitivity() -> None:
    """Catches: comparison with a class's first member only, or two classes that are not joined in the end."""
    rng = random.Random(0)
    assert answer_classes([0, 2, None, 1], lambda a, b: abs(a - b) <= 1) == [0, 0, None, 0]
    for _ in range(200):
        values = [rng.choice([None, *range(12)]) for _ in range(rng.randrange(8))]
        classes = answer_classes(values, lambda a, b: 0 <= b - a <= 1)
        known = sorted({value for value in values if value is not None})
        runs = {value: sum(b - a > 1 for a, b in itertools.pairwise(known) if b <= value) for value in known}
        keys = [None if value is None else runs[value] for value in values]
        assert classes == [None if key is None else keys.index(key) for key in keys]
