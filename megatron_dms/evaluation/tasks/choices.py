"""GPQA, MMLU, ARC and HellaSwag as questions that the model answers with a letter, after reasoning.

MMLU, ARC and HellaSwag are usually reported by the log-likelihoods of the options. Figures from letters are
not comparable with those figures: for likelihoods, use lm-evaluation-harness on the exported model.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_dms.evaluation.answer_letters import choice_letter
from megatron_dms.evaluation.tasks.dataset_files import DatasetRow, problems_of
from megatron_dms.evaluation.tasks.source import Dataset
from megatron_dms.evaluation.tasks.task import Grades, Problem, Task, ask, grades_of

INSTRUCTION = (
    "Please reason step by step, and end with a line of the form\nAnswer: $LETTER\n"
    "where $LETTER is one of {letters}."
)

_GPQA = Dataset("Idavidrein/gpqa", "train", "gpqa_diamond")
_MMLU = Dataset("cais/mmlu", "test", "all")
_ARC = Dataset("allenai/ai2_arc", "test", "ARC-Challenge")
_HELLASWAG = Dataset("Rowan/hellaswag", "validation")


def _problem(identity: str, question: str, options: Sequence[str], right: int) -> Problem:
    letters = ascii_uppercase[: len(options)]
    listed = "\n".join(f"{letter}) {option.strip()}" for letter, option in zip(letters, options, strict=True))
    instruction = INSTRUCTION.replace("{letters}", ", ".join(letters))
    gold = {"letter": letters[right], "letters": letters}
    return Problem(identity, ask(f"{question.strip()}\n\n{listed}\n\n{instruction}"), gold)


def _task(
    name: str, rows: Iterable[DatasetRow], make: Callable[[DatasetRow], Problem], limit: int | None
) -> Task:
    def grade(problem: Problem, texts: Sequence[str]) -> Grades:
        letters, right = problem.gold["letters"], problem.gold["letter"]
        return grades_of([choice_letter(text, letters) for text in texts], lambda letter: letter == right)

    return Task(name, True, problems_of(rows, make, limit), grade)


def _texts(row: DatasetRow, name: str, value: Any) -> list[str]:
    """Return the options of a row: at least two texts, at most as many as there are letters.

    Raises:
        ValueError: the value is something else.
    """
    good = isinstance(value, list) and all(isinstance(text, str) for text in value)
    if not good or not 2 <= len(value) <= len(ascii_uppercase):
        raise row.error(f"column {name}: found {str(value)[:60]}, expected a list of two or more texts")
    return value


def gpqa(source: Path | None, limit: int | None, tokenizer: Any = None, *, seed: int = 0) -> Task:
    """Load GPQA diamond.

    Args:
        seed: decides the order of the options. The order is a function of the seed and the record's id only,
            so it is the same in each run and does not depend on the rest of the file.
    """
    wrong = [f"Incorrect Answer {number}" for number in (1, 2, 3)]

    def make(row: DatasetRow) -> Problem:
        names = ["Question", "Correct Answer", *wrong, "Record ID"]
        row.require(*names)
        identity = row.label("Record ID")
        options = [row.label(name) for name in names[1:-1]]  # an option may be a number in the file
        order = sorted(
            range(len(options)),
            key=lambda index: hashlib.sha256(f"{seed}/{identity}/{index}".encode()).digest(),
        )
        return _problem(identity, row.text("Question"), [options[index] for index in order], order.index(0))

    return _task("gpqa", _GPQA.rows(source), make, limit)


def mmlu(source: Path | None, limit: int | None, tokenizer: Any = None) -> Task:
    """Load MMLU. The test split is sorted by subject, so a limit takes the first subjects only."""

    def make(row: DatasetRow) -> Problem:
        row.require("question", "choices", "answer", "subject")
        options = _texts(row, "choices", row.fields["choices"])
        right = row.get("answer", int)
        if not 0 <= right < len(options):
            raise row.error(f"column answer: found {right}, expected 0 to {len(options) - 1}")
        return _problem(f"{row.label('subject')}-{row.number}", row.text("question"), options, right)

    return _task("mmlu", _MMLU.rows(source), make, limit)


def arc(source: Path | None, limit: int | None, tokenizer: Any = None) -> Task:
    """Load ARC-Challenge. Its labels are A to E or 1 to 5; the model is always given A to E."""

    def make(row: DatasetRow) -> Problem:
        row.require("id", "question", "choices", "answerKey")
        choices = row.get("choices", dict)
        if set(choices) != {"text", "label"}:
            raise row.error(f"column choices: found {', '.join(map(str, choices))}, expected text and label")
        options, labels = (_texts(row, f"choices.{key}", choices[key]) for key in ("text", "label"))
        if len(options) != len(labels) or labels.count(row.label("answerKey")) != 1:
            raise row.error(
                f"found answerKey {row.label('answerKey')!r} and labels {labels} of {len(options)} options, "
                "expected the key once among as many labels as options"
            )
        right = labels.index(row.label("answerKey"))
        return _problem(row.label("id"), row.text("question"), options, right)

    return _task("arc", _ARC.rows(source), make, limit)


def hellaswag(source: Path | None, limit: int | None, tokenizer: Any = None) -> Task:
    """Load the validation split of HellaSwag: the labels of the test split are not published."""

    def make(row: DatasetRow) -> Problem:
        row.require("ind", "ctx", "endings", "label")
        options = [_clean(text) for text in _texts(row, "endings", row.fields["endings"])]
        right = str(row.fields["label"])
        if right not in map(str, range(len(options))):
            raise row.error(
                f"column label: found {right!r}, expected 0 to {len(options) - 1}; the test split has no "
                "labels, use the validation split"
            )
        question = f"How does this text go on?\n\n{_clean(row.text('ctx'))}"
        # `ind` counts separately within the two sources, so the row number is part of the id.
        return _problem(f"{row.label('ind')}-{row.number}", question, options, int(right))

    return _task("hellaswag", _HELLASWAG.rows(source), make, limit)


def _clean(text: str) -> str:
    """Remove the marks of the WikiHow part: [title] becomes a full stop, [header], [step] etc. are
    dropped."""
    text = re.sub(r"\s*\[title\]\s*", ". ", text.strip())
    return re.sub(r"\s{2,}", " ", re.sub(r"\[\w+\]", "", text)).removeprefix(". ").strip()
