"""Chats in a JSONL file, such as examples/tiny_reasoner writes, each with the answer that a chain must end
in.

A line is an object with `id`, `messages` and `answer`, an integer. The last message is the assistant's; it is
left out of the prompt.
"""

import re
from pathlib import Path
from typing import Any

from megatron_dms.evaluation.tasks.dataset_files import DatasetRow, problems_of, read_rows
from megatron_dms.evaluation.tasks.task import Problem, Task, grades_of

# What may follow the answer: the end of the turn, padding, full stops and white space.
_ANSWER = re.compile(r"(?:^|\s)answer\s+(-?\d+)\s*\.?\s*$")
_END_OF_TURN = "<|im_end|>"
_PADDING = "<pad>"


def final_answer(text: str) -> str | None:
    """Return the number after "answer" at the end of a generated text; None if it is missing or cut off.

    Args:
        text: the generated text, with or without special tokens; only its first turn counts.
    """
    said = text.split(_END_OF_TURN, maxsplit=1)[0].replace(_PADDING, " ")
    match = _ANSWER.search(said)
    return match.group(1) if match else None


def tiny_reasoner(source: Path | None, limit: int | None, tokenizer: Any = None) -> Task:
    """Load the problems of a file.

    Raises:
        ValueError: there is no such file, or a line is not as described above.
    """
    if source is None or not source.is_file():
        raise ValueError(
            f"found source {source}, expected a JSONL file; examples/tiny_reasoner/problems.py makes one"
        )

    def make(row: DatasetRow) -> Problem:
        row.require("id", "messages", "answer")
        answer = row.label("answer")
        if not re.fullmatch(r"-?\d+", answer):
            raise row.error(f"column answer: found {answer!r}, expected an integer")
        return Problem(row.label("id"), _asked(row), answer)

    return Task(
        "tiny_reasoner",
        True,
        problems_of(read_rows([source]), make, limit),
        lambda problem, texts: grades_of(
            [final_answer(text) for text in texts], lambda answer: answer == problem.gold
        ),
    )


def _asked(row: DatasetRow) -> list[dict[str, str]]:
    messages = row.get("messages", list)
    parts = ("role", "content")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in parts):
            raise row.error("column messages: expected objects with the texts role and content")
    roles = [message["role"] for message in messages]
    if len(roles) < 2 or roles[-1] != "assistant" or roles[-2] == "assistant":
        raise row.error(
            f"column messages: found the roles {', '.join(roles) or 'none'}, expected a question and, last, "
            "the assistant's answer"
        )
    return [{part: message[part] for part in parts} for message in messages[:-1]]
