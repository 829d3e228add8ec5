"""Answers found in text, and which of them are the same."""

import itertools
import random
import threading
import time

import pytest

from megatron_dms.evaluation.answers import (
    MathAnswer,
    answer_classes,
    choice_letter,
    integer_answer,
    last_box,
    math_answer,
    math_equal,
    math_gold,
)

BOXES = [
    (r"so \boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\sqrt{\frac{1}{2}}} }", r"\sqrt{\frac{1}{2}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{ 3 } and then \boxed{4", "3"),
    (r"\fbox {7}", "7"),
    (r"a { stray and \boxed{8}", "8"),
    (r"a stray } and \boxed{8}", "8"),
    (r"\boxed{3}, or rather \boxed{}", ""),
    ("3", None),
    (r"\boxed{3", None),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_last_box(text: str, content: str | None) -> None:
    r"""Catches: the first brace taken for the end, \{ counted as a brace, a box that the cut left open."""
    assert last_box(text) == content


def test_degenerate_text_takes_no_time() -> None:
    """Catches: boxes searched anew from each opening (quadratic), patterns that try every split of a run of
    stars (exponential), Python's limit on the digits of an int."""
    start = time.perf_counter()
    assert last_box(r"\boxed{" * 20_000) is None
    assert choice_letter("The answer is $" + "*" * 5000 + "x" + " " * 5000 + "\n" * 20_000) is None
    assert integer_answer(r"\boxed{" + "9" * 10_000 + "}") is None
    assert integer_answer(r"\boxed{" + "0" * 10_000 + "7}") == 7
    assert integer_answer(r"\boxed{7" + " " * 20_000 + r"\text{" * 5000 + "x}") is None
    assert integer_answer(r"\boxed{7" + "^ " * 20_000 + "=" * 20_000 + "}") is None
    assert time.perf_counter() - start < 5


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
    assert one is not None and other is not None and not math_equal(one, other, seconds=1)
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


LETTERS = [
    ("Answer:\n- C", "C"),
    ("Answer: `C`", "C"),
    ("Answer: “C”.", "C"),
    ("答案 Answer\uff1a(C)", "C"),
    (r"Answer: \(\mathbf{C}\)", "C"),
    ("<final_answer> C </final_answer>", "C"),
    (r"\boxed{\text{Choice C}}", "C"),
    (r"\boxed{\bf (C)}", "C"),
    (r"\boxed{C - Oslo}", "C"),
    (r"\boxed{C \text{ is right}}", "C"),
    (r"\boxed C", "C"),
    ("So **C** is the right option.", "C"),
    ("Option (D) is correct.", "D"),
    ("A few words.\n(C) 9.81", "C"),
    ("(A) 4\n(B) 5", None),
    ("The answer is not B but D.", "D"),
    ("I would choose C.", "C"),
    ("<think>The answer is (A).</think>Hm.", None),
    ("The answer is (A).</think>The answer is (B).", "B"),
    ("The answer is (B). <think>Or is the answer (A)?", "B"),
    (r"\boxed{A} and \boxed{B}", None),
    (r"\boxed{B}, \boxed{B}", "B"),
    ("The answer is A/B", None),
    ("The answer is A, B", None),
    ("The answer is (C)", "C"),
    ("the correct answer is: B.", "B"),
    ("**Answer:** D", "D"),
    ("**Answer: D**", "D"),
    ("ANSWER: B", "B"),
    ("The correct option is D", "D"),
    ("The answer is option (B) because", "B"),
    (r"\boxed{C}", "C"),
    (r"$\boxed{\text{(C)}}$", "C"),
    (r"$\boxed{\textbf{(B)}\ 42}$", "B"),
    (r"\boxed{C. 42}", "C"),
    (r"The answer is $\boxed{A}$", "A"),
    (r"The answer is $\mathbf{B}$", "B"),
    ("The answer is (A). Wait, no. The answer is (D), for A is odd.", "D"),
    (r"\boxed{A}, or rather: the answer is (B)", "B"),
    (r"The answer is (B), or rather \boxed{A}", "A"),
    ("The answer is **(B)**, and not C. **D** is odd.", "B"),
    ("**A** is odd\n**B** is right", "B"),
    ("I choose\n**C) 42**", "C"),
    ("It is\n\n  (B).", "B"),
    ("The answer is A.", "A"),
    ("Answer: A", "A"),
    ("Answer: A\nThe reason is this", "A"),
    ("The answer is A because it is", "A"),
    ("The answer is A good one", None),
    ("Answer: A good approach is", None),
    ("A dog is here.", None),
    ("**A dog** is here", None),
    ("the answer is a prime", None),
    ("The answer is Benzene", None),
    ("The answer is C-14", None),
    ("The answer is B or C", None),
    ("The answer is (A) or (B).", None),
    ("The answer is not A", None),
    ("The answer is E", None),
    (r"\boxed{C_5}", None),
    (r"\boxed{42}", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), LETTERS)
def test_choice_letter(text: str, letter: str | None) -> None:
    """Catches: the article A, the first letter of a word, an earlier statement, bold text over a
    statement."""
    assert choice_letter(text) == letter


def test_more_letters() -> None:
    """Catches: letters of four options where there are ten, or regular expressions made of them."""
    assert choice_letter("The answer is (J)", "ABCDEFGHIJ") == "J"
    assert choice_letter("The answer is (J)") is None
    assert choice_letter("The answer is (B)", "A-C") is None


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
