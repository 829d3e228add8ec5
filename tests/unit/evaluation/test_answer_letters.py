"""Letters as answers to multiple choice questions."""

import pytest

from megatron_dms.evaluation.answer_letters import choice_letter

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
