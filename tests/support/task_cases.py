"""Rows in the datasets' own formats, and helpers that the tests of the tasks share."""

import json
from pathlib import Path
from typing import Any

from megatron_dms.evaluation.tasks import Task

MATH = [
    {"problem": "Half of one?", "answer": "\\frac{1}{2}", "unique_id": "test/algebra/1.json", "level": 1},
    {"problem": "Root?", "answer": "2\\sqrt{3}", "unique_id": "test/algebra/3.json", "level": 2},
    {"problem": "How far?", "answer": "12 \\text{ m}", "unique_id": "test/algebra/2.json", "level": 1},
]
AIME = [{"id": 60, "problem": "Count.", "solution": "So 33.", "answer": "033", "url": "", "year": "2024"}]
GSM8K = [
    {"question": "How many?", "answer": "He has 2*36=<<2*36=72>>72.\n#### 72"},
    {"question": "How much?", "answer": "It is a lot.\n#### 1,234"},
]
MMLU = [
    {"question": "Which?", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 2},
    {"question": "Which?", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 0},
]
ARC = [
    {
        "id": "Mercury_1",
        "question": "Why?",
        "choices": {"text": ["p", "q", "r"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    },
    {
        "id": "Mercury_2",
        "question": "Why?",
        "choices": {"text": ["p", "q", "r", "s", "t"], "label": list("ABCDE")},
        "answerKey": "E",
    },
]
HELLASWAG = [
    {
        "ind": 24,
        "activity_label": "Roof",
        "ctx": "How to fix [title] Take a tool. [step] A man",
        "endings": ["sings.", "[substeps] works.", "flies.", "sleeps."],
        "split": "val",
        "label": "1",
    }
]
CHAT = [
    {
        "id": "heldout-1-0",
        "messages": [
            {"role": "system", "content": "work"},
            {"role": "user", "content": "a = 3 ; what is a ?"},
            {"role": "assistant", "content": "a = 3 -> a 3 ; answer 3"},
        ],
        "answer": "3",
    }
]
FORMATS: dict[str, list[dict[str, Any]]] = {
    "math500": MATH,
    "aime24": AIME,
    "gsm8k": GSM8K,
    "mmlu": MMLU,
    "arc": ARC,
    "hellaswag": HELLASWAG,
    "tiny_reasoner": CHAT,
}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def graded(task: Task, *texts: str, index: int = 0) -> list[tuple[str | None, bool]]:
    return [(chain.answer, chain.correct) for chain in task.grade(task.problems[index], texts).chains]


def question(task: Task, index: int = 0) -> str:
    (message,) = task.problems[index].messages
    assert message["role"] == "user"
    return message["content"]
