r"""Answers in the shapes of MATH-500's, the ways in which models write them, and answers that are nearly so.

    python -m tests.support.answer_rewritings      prints both rates, and every pair that is graded wrongly

The answers are our own. Each is graded against its rewritings (right) and its neighbours (wrong).
"""

import re
from collections.abc import Callable, Iterator

from megatron_dms.evaluation.answers import math_answer, math_equal, math_gold

NUMBERS = "0 7 42 -3 100 2005 58,500 1,234,567 .0000731 0.25 3.7 -1.5 13.50".split()
ANGLES = [r"45^\circ", r"120^{\circ}", r"7.5^\circ"]
SHARES = [r"35\%", r"12.5\%", r"\$24.60", r"\$3"]
UNITS = [r"15 \text{ cm}", r"96 \text{ m}^2", r"24\text{ inches}", r"8 \text{ hours}", r"6.5 \text{ mph}"]
FRACTIONS = [
    *(
        r"\frac{3}{4}",
        r"-\frac{7}{9}",
        r"\frac{11}2",
        r"\frac35",
        r"\dfrac{2}{13}",
        r"\tfrac{5}{6}",
        r"\frac1{12}",
    ),
    *("7/8", r"-\dfrac{35}{9}", r"\frac{1}{2^{50}}", r"\frac{1}{997!}", r"\frac{270}7\text{ degrees}"),
    *(r"12 \frac{1}{3}", r"3\frac{5}{8}", r"0.\overline{27}", r"\frac{\sqrt{5}}{4}", r"\frac{9\sqrt{2}}{8}"),
]
ROOTS = [
    *(r"\sqrt{23}", r"4\sqrt{11}", r"-2\sqrt{7}", r"5 + 2\sqrt{6}", r"3 - \sqrt{2}", r"\sqrt[3]{12}"),
    *(
        r"\frac{1 + \sqrt{5}}{2}",
        r"\frac{-3 - \sqrt{17}}{4}",
        r"2\sqrt{3} + 3\sqrt{2}",
        r"\sqrt{2 + \sqrt{3}}",
    ),
    *(r"12\sqrt{5} \text{ cm}", r"1 \pm \sqrt{19}", r"\frac{5 \pm \sqrt{13}}{6}"),
]
PI = [
    r"3\pi",
    r"\frac{\pi}{6}",
    r"\frac{25\pi}{4}",
    r"16 - 4\pi",
    r"2\pi + 6",
    r"36\pi \text{ cm}^3",
    r"\pi^2",
]
POWERS = [
    "2^{75}",
    "10^{12}",
    "3^{-9}",
    r"6.2 \times 10^{-17}",
    "5 \\cdot 7^{20}",
    "2^{1000} - 1",
    "11!",
    r"\binom{9}{4}",
]
BASES = ["204_5", "1011_2", "63_{8}", "3AF_{16}", "2202_3"]
COMPLEX = [
    "4 - 3i",
    "-1 + 8i",
    "2+i",
    "-i",
    "5i",
    r"\frac{1}{2} + \frac{\sqrt{3}}{2} i",
    "13 + 274i",
    r"-\frac{3}{5} - 2i",
]
TUPLES = [
    *("(2,5)", "(-1, 4)", r"\left( 4, \frac{\pi}{3} \right)", r"\left(\frac{2}{3}, -\frac{1}{7}\right)"),
    *("(1,2,-3)", "(0,9)", r"(\sqrt{3}, 1)", r"\left( 3, \frac{7 \pi}{4}, -2 \right)", "(3, 5), (7, 1)"),
]
INTERVALS = [
    *("[2,7)", "(-3,4]", r"(-\infty, 5)", r"[-\frac{1}{2}, \infty)", r"(-\infty, -1) \cup (3, \infty)"),
    *(r"[-4, 0] \cup [1, 6)", r"\left[ \frac{1}{3}, 2 \right]", r"(0, 1) \cup (1, 2) \cup (2, \infty)"),
]
LISTS = [
    "3, -5",
    "1,2,4",
    r"\{2, 3, 8\}",
    r"-\sqrt{2}, \sqrt{2}",
    r"\frac{1}{2}, 6",
    r"4 \text{ and } 9",
    r"-2 \text{ or } 7",
]
EQUATIONS = [
    *(
        "x = 6",
        "y = 3x - 4",
        r"y = -\frac{1}{2}x + 5",
        "x^2 + y^2 = 49",
        "3x - 2y + 7 = 0",
        r"x \ge 4",
        "-1 < x < 3",
    ),
    *(r"x \le -2", r"2x + 3y = 12", r"k = \frac{7}{3}", "2 < t \\le 9"),
]
POLYNOMIALS = [
    *(
        "x^2 - 5x + 6",
        "3x^3 + 2x - 1",
        "(x-2)(x+7)",
        "-4t^2 + 9",
        "2a + 3b",
        "x^4 + 4",
        "n(n+1)",
        r"\frac{x+1}{x-3}",
    ),
    *(
        r"\frac{n(n-1)}{2}",
        "5x^2y^3",
        r"\sqrt{x^2 + 1}",
        "p^2 - q^2",
        "6r^2 - 4r - 24",
        "2^{n} - 1",
        r"\sin x + 2\cos x",
    ),
    *(
        r"\cot 3x",
        r"\ln 8",
        r"\log_2 11",
        r"e^{5}",
        "|x - 3|",
        r"\tan^2 y",
        r"\lfloor x \rfloor",
        "x_1 + 2x_2",
    ),
]
MATRICES = [
    r"\begin{pmatrix} 3 \\ -8 \\ 5 \end{pmatrix}",
    r"\begin{pmatrix} 2 & 0 \\ -1 & 4 \end{pmatrix}",
    r"\begin{bmatrix} 1 & 2 & 3 \end{bmatrix}",
    r"\begin{pmatrix} \frac{1}{5} & \frac{2}{5} \\ 0 & 1 \end{pmatrix}",
]
TEXTS = [
    r"\text{Maria}",
    r"\text{odd}",
    r"\text{(C)}",
    "E",
    r"\text{neither}",
    r"\text{June 14}",
    r"\text{ellipse}",
    "2:5",
]
GOLDS = [
    *(*NUMBERS, *ANGLES, *SHARES, *UNITS, *FRACTIONS, *ROOTS, *PI, *POWERS, *BASES, *COMPLEX, *TUPLES),
    *(*INTERVALS, *LISTS, *EQUATIONS, *POLYNOMIALS, *MATRICES, *TEXTS),
]
_PLAIN_NUMBER = re.compile(r"-?[\d,]*\.?\d+")

Rewriting = Callable[[str], str | None]


def _spaces(gold: str, space: str) -> str | None:
    """Write `space` for the spaces between signs."""
    if r"\text" in gold or r"\begin" in gold or re.search(r"\d \\frac", gold):
        return None
    return re.sub(r"(?<=[^A-Za-z]) | (?=[^A-Za-z])", lambda _: space, gold)


def _replaced(*pairs: tuple[str, str]) -> Rewriting:
    def write(gold: str) -> str | None:
        new = gold
        for old, other in pairs:
            new = new.replace(old, other)
        return new if new != gold else None

    return write


def _of_numbers(form: str) -> Rewriting:
    return lambda gold: form.format(gold) if _PLAIN_NUMBER.fullmatch(gold) else None


def _zeros(gold: str) -> str | None:
    if not _PLAIN_NUMBER.fullmatch(gold):
        return None
    return gold + ("0" if "." in gold else ".00")


def _thousands(separator: str) -> Rewriting:
    return lambda gold: gold.replace(",", separator) if re.fullmatch(r"\d{1,3}(,\d{3})+", gold) else None


def _upright(gold: str) -> str | None:
    return rf"\text{{{gold}}}" if re.fullmatch(r"[-\d.,() ]+", gold) else None


def _slashes(gold: str) -> str | None:
    new = re.sub(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", gold)
    new = re.sub(r"^(\d+) ?\\frac\{(\d+)\}\{(\d+)\}$", r"\1 \2/\3", new)
    return new if new != gold else None


def _short_fractions(gold: str) -> str | None:
    new = re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", gold)
    return new if new != gold else None


def _imaginary(form: str) -> Rewriting:
    return lambda gold: (
        re.sub(r"(?<=\d)i\b", lambda _: form, gold) if gold in COMPLEX and "5i" != gold else None
    )


def _around(form: str) -> Rewriting:
    return lambda gold: form.replace("@", gold)


REWRITINGS: dict[str, Rewriting] = {
    "as it is": _around("@"),
    "full stop": _around("@."),
    "comma": _around("@,"),
    "space after it": _around("@\\ "),
    "tilde": _around("@~"),
    "line ends": _around("\n@\n"),
    "a quad": _around(r"\quad @ \quad"),
    "display style": _around(r"\displaystyle @"),
    "large": _around(r"{\Large @}"),
    "bold": lambda gold: None if r"\text" in gold else rf"\mathbf{{{gold}}}",
    "bold symbols": lambda gold: rf"\boldsymbol{{{gold}}}",
    "old bold": _around(r"{\bf @}"),
    "colour": _around(r"\color{red}{@}"),
    "text colour": _around(r"\textcolor{blue}{@}"),
    "underlined": _around(r"\underline{@}"),
    "braces": _around("{@}"),
    "dollars": _around("$@$"),
    "parentheses of TeX": _around(r"\(@\)"),
    "brackets of TeX": _around(r"\[ @ \]"),
    "bold of Markdown": _around("**@**"),
    "a box within": _around(r"\boxed{@}"),
    "no spaces": lambda gold: _spaces(gold, ""),
    "wide spaces": lambda gold: _spaces(gold, r"\, "),
    "dfrac": _replaced((r"\frac", r"\dfrac")),
    "tfrac": _replaced((r"\frac", r"\tfrac")),
    "short fractions": _short_fractions,
    "slashes": _slashes,
    "no left and right": _replaced((r"\left", ""), (r"\right", "")),
    "big brackets": _replaced((r"\left", r"\bigl"), (r"\right", r"\bigr")),
    "left and right": lambda gold: (
        gold.replace("(", r"\left(").replace(")", r"\right)")
        if "(" in gold and r"\left" not in gold
        else None
    ),
    "Unicode's minus": _replaced(("-", "\u2212")),
    "Unicode": _replaced(
        (r"\pi", "π"), (r"\infty", "∞"), (r"\cup", "∪"), (r"^\circ", "°"), (r"\times", "×"), (r"\le ", "≤ ")
    ),
    "zeros at the end": _zeros,
    "a unit": _of_numbers(r"{}\text{{ units}}"),
    "a word": _of_numbers("{} apples"),
    "a name": _of_numbers("n = {}"),
    "upright": _upright,
    "thousands in braces": _thousands("{,}"),
    "thousands with spaces": _thousands(r"\,"),
    "thousands with \\!": _thousands(r",\!"),
    "no thousands": _thousands(""),
    "i with a space": _imaginary(" i"),
    "i with a dot": _imaginary(r" \cdot i"),
    "i upright": _imaginary(r"\mathrm{i}"),
    "rows with a distance": _replaced((r"\\ ", r"\\[4pt] ")),
    "another matrix": _replaced(("pmatrix", "bmatrix")),
}


def rewritings() -> Iterator[tuple[str, str, str]]:
    """Yield each gold, the name of a rewriting, and the text of an answer."""
    for gold in GOLDS:
        for name, write in REWRITINGS.items():
            if (new := write(gold)) is not None:
                yield gold, name, rf"So the answer is $\boxed{{{new}}}$."


def _mutants(gold: str) -> Iterator[str]:
    for found in re.finditer(r"\d", gold):
        for step in (1, 2):
            digit = str((int(found[0]) + step) % 10)
            yield gold[: found.start()] + digit + gold[found.end() :]
    for found in re.finditer(r"(?<!\\begin)[-+]", gold):
        yield gold[: found.start()] + ("-" if found[0] == "+" else "+") + gold[found.end() :]
    for one, other in (
        *(
            ("[", "("),
            ("(", "["),
            ("]", ")"),
            (")", "]"),
            (r"\le ", "< "),
            (r"\ge ", "> "),
            ("<", ">"),
            (r"\ge", r"\le"),
        ),
        *(
            ("sin", "cos"),
            (r"\pi", "e"),
            ("x", "z"),
            (r"\cup", r"\cap"),
            (r"\sqrt", r"\frac12"),
            ("Maria", "Mario"),
        ),
        *(
            ("odd", "even"),
            ("(C)", "(B)"),
            ("E", "F"),
            (r"\text{ cm}", r"\text{ m}"),
            ("inches", "feet"),
            ("hours", "minutes"),
        ),
        *(
            ("June", "July"),
            ("pmatrix", "vmatrix"),
            (r" \\ ", " & "),
            (" & ", r" \\ "),
            (r"\infty", "100"),
            ("i", ""),
        ),
        *(
            ("neither", "both"),
            ("ellipse", "circle"),
            (r"\log", r"\ln"),
            ("lfloor x \\rfloor", "lceil x \\rceil"),
        ),
    ):
        if one in gold:
            for found in re.finditer(re.escape(one), gold):
                yield gold[: found.start()] + other + gold[found.end() :]


def near_misses() -> Iterator[tuple[str, str]]:
    """Yield each gold and an answer that differs from it in one sign, or by an element more or less."""
    for gold in GOLDS:
        seen = {gold}
        for new in _mutants(gold):
            if new not in seen and (gold, new) not in EQUAL_NEIGHBOURS:
                seen.add(new)
                yield gold, new
        if re.match(r"[\d\\(x\[]", gold) and gold != "0":
            yield gold, "-" + gold
        if gold not in TEXTS:
            yield gold, gold + ", 77"
            yield gold, gold + " + 1"
        if gold in FRACTIONS and (parts := re.search(r"frac\{(\d+)\}\{(\d+)\}", gold)):
            yield gold, gold.replace(parts[0], f"frac{{{parts[2]}}}{{{parts[1]}}}")
        if gold in TUPLES + LISTS and "," in gold:
            inner = gold.strip("(){}\\").split(",")
            if gold in TUPLES and gold.count("(") == 1 and r"\left" not in gold:
                yield gold, f"({','.join(inner[::-1])})"
            yield gold, ",".join(inner[:-1]) if gold in LISTS else f"({','.join(inner[:-1])})"
        if gold in BASES:
            yield gold, gold.partition("_")[0] + "_{10}"
            yield gold, gold.partition("_")[0]
    for index, gold in enumerate(GOLDS):
        for other in GOLDS[index + 1 :]:
            yield gold, other


# Neighbours that happen to be equal, or that only misspell a unit.
EQUAL_NEIGHBOURS = {
    ("0", "-0"),
    (r"\binom{9}{4}", r"\binom{9}{5}"),
    (r"24\text{ inches}", r"24\text{ nches}"),
}


def grade(gold: str, text: str) -> bool:
    answer = math_answer(text)
    return answer is not None and math_equal(math_gold(gold), answer)


def main() -> None:
    right = wrong = agreed = mistaken = 0
    for gold, name, text in rewritings():
        right += 1
        if grade(gold, text):
            agreed += 1
        else:
            print("right, graded wrong:", gold, "|", name, "|", text)
    for gold, other in near_misses():
        wrong += 1
        if grade(gold, rf"\boxed{{{other}}}"):
            mistaken += 1
            print("wrong, graded right:", gold, "|", other)
    print(
        f"{len(GOLDS)} answers; {len(REWRITINGS)} rewritings: {agreed} of {right} right answers graded right"
    )
    print(f"{mistaken} of {wrong} wrong answers graded right")


if __name__ == "__main__":
    main()
