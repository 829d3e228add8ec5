"""Benchmarks: problems from the datasets' own formats, the prompts for a model, the grades of its answers.

    from megatron_dms.evaluation.tasks import load_task

    task = load_task("math500", "/data/MATH-500", limit=100)
    for problem in task.problems:
        grades = task.grade(problem, texts)  # texts: the text of each of the W chains
        task.solved(grades)

Importing this package does not import the tasks.
"""

import inspect
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from megatron_dms.evaluation.tasks.task import Graded, Grades, Problem, Task

__all__ = ["EXECUTING", "TASKS", "Graded", "Grades", "Problem", "Task", "load_task"]

# Task: the module with the function of the same name that loads the task.
_MODULES = {
    "aime24": "mathematics",
    "math500": "mathematics",
    "gsm8k": "mathematics",
    "gpqa": "choices",
    "mmlu": "choices",
    "arc": "choices",
    "hellaswag": "choices",
    "livecodebench": "livecodebench",
    "ruler_niah": "ruler",
    "ruler_vt": "ruler",
    "tiny_reasoner": "tiny_reasoner",
}
TASKS = tuple(_MODULES)
EXECUTING = ("livecodebench",)
"""Tasks whose grading executes generated programs."""
_WORDS = {date: "a day as YYYY-MM-DD", int: "a whole number", str: "a text"}  # the first match counts


def load_task(
    name: str,
    source: str | Path | None = None,
    limit: int | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Task:
    """Read or generate the problems of a task.

    Args:
        name: one of TASKS.
        source: the dataset's file, or the folder that the dataset was downloaded to; None for the hub. The
            ruler tasks are generated and take no source; tiny_reasoner needs a file.
        limit: number of problems to take, in the dataset's order; None for all (the ruler tasks: 100).
        tokenizer: measures the prompts of the ruler tasks; the other tasks do not use it.
        options: options of the task's function, such as `seed` of gpqa or `since` of livecodebench.

    Raises:
        ValueError: the task or an option is unknown, an argument is out of range, the source cannot be read,
            or a row is not what the dataset documents. The message names the file and the row.
    """
    if name not in _MODULES:
        raise ValueError(f"found task {name!r}, expected one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"found limit {limit}, expected at least 1 problem")
    loader = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    known = {
        parameter.name: parameter.annotation
        for parameter in inspect.signature(loader).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"task {name}: found option {', '.join(unknown)}, expected "
            + (f"one of {', '.join(known)}" if known else "none: it has no options")
        )
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, known[option]):
            raise ValueError(
                f"task {name}: found option {option} {value!r}, expected {_words(known[option])}"
            )
    return loader(None if source is None else Path(source), limit, tokenizer, **options)


def _words(annotation: Any) -> str:
    """Describe the values that an option takes."""
    kinds = get_args(annotation) or (annotation,)
    return next(text for kind, text in _WORDS.items() if kind in kinds)
