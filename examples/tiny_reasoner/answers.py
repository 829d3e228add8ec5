"""Find the final answer in a generated text and score it by exact match.

The chain of thought ends with "answer 3". Text after the end-of-turn token, or a text that was cut off before
the final line, must not count, so the line has to be the last thing said.
"""

import re
from collections.abc import Sequence

# What may follow the answer: the end of the turn, padding, full stops and white space.
_ANSWER = re.compile(r"(?:^|\s)answer\s+(-?\d+)\s*\.?\s*$")
_END_OF_TURN = "<|im_end|>"
_PADDING = "<pad>"


def extract_answer(text: str) -> str | None:
    """The final answer of a generated text, or None where it is missing, malformed or cut off.

    Args:
        text: what the model said, with or without special tokens; only the first turn counts.
    """
    said = text.split(_END_OF_TURN, maxsplit=1)[0].replace(_PADDING, " ")
    match = _ANSWER.search(said)
    return match.group(1) if match else None


def exact_match(texts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether each generated text ends in its problem's answer.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(texts) != len(answers):
        raise ValueError(f"{len(texts)} texts but {len(answers)} answers: give one answer for each text")
    return [extract_answer(text) == answer for text, answer in zip(texts, answers, strict=True)]


def standard_error(accuracy: float, count: int) -> float:
    """The binomial standard error of an accuracy measured on `count` problems."""
    return (accuracy * (1.0 - accuracy) / count) ** 0.5
