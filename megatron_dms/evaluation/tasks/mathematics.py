r"""AIME 2024, MATH-500 and GSM8K: the model is asked to put its answer in a \boxed{}."""

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_dms.evaluation.answer_numbers import integer_answer, number_of, stated_number
from megatron_dms.evaluation.answer_text import last_boxes, visible
from megatron_dms.evaluation.answers import math_answer, math_equal, math_gold
from megatron_dms.evaluation.tasks.dataset_files import DatasetRow, problems_of
from megatron_dms.evaluation.tasks.source import Dataset
from megatron_dms.evaluation.tasks.task import Problem, Task, ask, grades_of

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

_AIME24 = Dataset("HuggingFaceH4/aime_2024", "train")
_MATH500 = Dataset("HuggingFaceH4/MATH-500", "test")
_GSM8K = Dataset("openai/gsm8k", "test", "main")

_NUMBER = r"-?(?:\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+)"
_GROUPED = r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?"


def _question(text: str) -> list[dict[str, str]]:
    return ask(f"{text.strip()}\n\n{INSTRUCTION}")


def aime24(source: Path | None, limit: int | None, tokenizer: Any = None) -> Task:
    """Load AIME 2024: answers are whole numbers from 0 to 999, compared exactly.

    The columns may be named as in HuggingFaceH4/aime_2024 or as in Maxwell-Jia/AIME_2024.
    """

    def make(row: DatasetRow) -> Problem:
        names = ("Problem", "Answer", "ID") if "Problem" in row.fields else ("problem", "answer", "id")
        row.require(*names)
        question, answer, identity = names
        value = row.label(answer)
        if not re.fullmatch(r"\d{1,3}", value):
            raise row.error(f"column {answer}: found {value!r}, expected a whole number from 0 to 999")
        return Problem(row.label(identity), _question(row.text(question)), int(value))

    return Task(
        "aime24",
        True,
        problems_of(_AIME24.rows(source), make, limit),
        lambda problem, texts: grades_of(
            [integer_answer(text) for text in texts], lambda answer: answer == problem.gold
        ),
    )


def math500(source: Path | None, limit: int | None, tokenizer: Any = None) -> Task:
    """Load MATH-500: answers are formulas, compared by Math-Verify. It is graded in the main thread only."""

    def make(row: DatasetRow) -> Problem:
        row.require("problem", "answer", "unique_id")
        return Problem(row.label("unique_id"), _question(row.text("problem")), row.text("answer"))

    def grade(problem: Problem, texts: Any) -> Any:
        gold = math_gold(problem.gold)
        return grades_of(
            [math_answer(text) for text in texts],
            lambda answer: math_equal(gold, answer),
            math_equal,
            lambda answer: answer.text,
        )

    return Task("math500", True, problems_of(_MATH500.rows(source), make, limit), grade)


def gsm8k(source: Path | None, limit: int | None, tokenizer: Any = None) -> Task:
    """Load GSM8K: answers are numbers, compared exactly. Its solutions end in "#### 72" or "#### 1,234"."""

    def make(row: DatasetRow) -> Problem:
        row.require("question", "answer")
        end = re.search(rf"####\s*\$?({_NUMBER})\s*$", row.text("answer"))
        gold = _plain(end[1]) if end else None
        if gold is None:
            raise row.error(
                f"column answer: found {row.text('answer')[-40:]!r} at its end, expected #### and a number"
            )
        return Problem(f"gsm8k-{row.number}", _question(row.text("question")), gold)

    return Task(
        "gsm8k",
        True,
        problems_of(_GSM8K.rows(source), make, limit),
        lambda problem, texts: grades_of(
            [number_answer(text) for text in texts], lambda answer: answer == problem.gold
        ),
    )


def number_answer(text: str) -> str | None:
    r"""Return the number that a generated text gives as its answer.

    The answer is the number in the last box. Without a box, it is the number after the last "answer is",
    "answer:" or "####". Words, a unit, a currency, a per cent sign and thousands separators are left out; of
    "5 + 13 = 18", only the part after the last "=" is read. A number within a formula is not an answer, nor
    is one that is merely mentioned (see `integer_answer`); thoughts do not count.

    Returns:
        the number without separators, leading zeros and trailing zeros after the decimal point: equal numbers
        are equal texts. None if the box has no number or several numbers, such as a fraction.
    """
    text = visible(text)
    boxes = last_boxes(text)
    if len(boxes) > 1:
        return None
    number = number_of(boxes[0], words=True) if boxes else stated_number(text, words=True)
    return None if number is None else _plain(number)


def _plain(number: str) -> str | None:
    if "," in number and not re.fullmatch(_GROUPED, number):
        return None  # a list
    text = format(Decimal(number.replace(",", "")), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
