"""Score generated texts by exact match of their final answer.

A chain of thought ends with a line such as "answer 3". This line has to be the end of the turn: text after
the end-of-turn token does not count, nor does a text that was cut off before this line.
"""

from collections.abc import Sequence

from megatron_dms.evaluation.tasks.tiny_reasoner import final_answer as extract_answer


def exact_match(texts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Return whether each generated text ends in its problem's answer.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(texts) != len(answers):
        raise ValueError(f"{len(texts)} texts but {len(answers)} answers: give one answer for each text")
    return [extract_answer(text) == answer for text, answer in zip(texts, answers, strict=True)]


def standard_error(accuracy: float, count: int) -> float:
    """Return the binomial standard error of an accuracy that was measured on `count` problems."""
    return (accuracy * (1.0 - accuracy) / count) ** 0.5
