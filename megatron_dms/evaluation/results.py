"""Grade the samples of an evaluation and write its results. Needs no model.

OUT/results.json      rows of the table, mean gains, differences to vanilla, what was left out, what scored it
OUT/problems.jsonl    accuracy, answers and costs of each problem
OUT/report.html       figures, table, settings
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dms.evaluation.budgets import Budget
from megatron_dms.evaluation.evaluation_run import IN_THOUGHTS, TaskChoice, problems_mark, without_sandbox
from megatron_dms.evaluation.samples import (
    SETTINGS,
    Sample,
    SampleFile,
    compresses,
    read_settings,
    runs_there,
    samples_path,
)
from megatron_dms.evaluation.tasks import Task
from megatron_dms.files import write_durably
from megatron_dms.inference.loading import load_tokenizer
from megatron_dms.provenance import made_by

_KINDS = {"task": (str,), "data": (str, type(None)), "limit": (int, type(None)), "task_options": (dict,)}


def score(out: Path, data: str | None, say: Callable[[str], None], sandbox: bool = True) -> dict[str, Any]:
    """Grade all samples in `out`, and write results.json, problems.jsonl and report.html.

    Runs that are not complete are left out and named, and so are runs that were to compress and did not.

    Args:
        data: where the task's data is now; None if it did not move.
        say: gets a line for each run that is left out, and one if generated programs are executed.
        sandbox: False executes the programs of a code task as this user, with all that this user may do.

    Returns:
        the content of results.json, and under "table" the MethodScores of its rows.

    Raises:
        ValueError: `out` holds no evaluation, or no run to score; the task has other problems now.
    """
    from megatron_dms.evaluation.report import mean_gains, report
    from megatron_dms.evaluation.scoring import differences, score_problems, summarise

    settings = read_settings(out)
    if data is not None:
        settings["data"] = data
    choice = _choice(settings, f"{out}/{SETTINGS}")
    # Whether programs may run without a sandbox is asked for anew at each call.
    options = {name: value for name, value in choice.options.items() if name != "sandbox"}
    choice = replace(choice, options=options if sandbox else without_sandbox(choice.name, options))
    measures = choice.name.startswith("ruler")  # the texts of these tasks are made to a length in tokens
    task = choice.load(load_tokenizer(_first_model(settings, out)) if measures else None)
    if task.notice:
        say(task.notice)
    if settings.get(IN_THOUGHTS):
        task = _with_thoughts_opened(task)
    if problems_mark(task) != settings.get("problems"):
        raise ValueError(
            f"the problems of {choice.name} are not those of the samples: {problems_mark(task)}, expected "
            f"{settings.get('problems')}"
        )
    grouped: dict[tuple[str, Budget], dict[int, list[Sample]]] = {}
    left_out = []
    for run in runs_there(out):
        samples = SampleFile(samples_path(out, run)).samples
        if len(samples) < len(task.problems):
            left_out.append(f"{run}, {len(samples)} of {len(task.problems)} problems")
        elif not compresses(run, samples):
            left_out.append(f"{run}, achieved CR 1")
        else:
            grouped.setdefault((run.method, run.budget), {})[run.seed] = samples
    for line in left_out:
        say(f"left out: {line}")
    if not grouped:
        raise ValueError(f"{out} has no complete run to score")
    problems, rows = [], []
    for (method, budget), by_seed in grouped.items():
        found = score_problems(task, method, budget, by_seed)
        problems += found
        rows.append(summarise(found, by_seed))
    compared, scorer = differences(problems), made_by()
    results = {
        "rows": [row.as_json() for row in rows],
        "mean_gain": mean_gains(rows),
        "difference_to_vanilla": [difference.as_json() for difference in compared],
        "left_out": left_out,
        "scored_by": scorer,
    }
    write_durably(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_durably(out / "problems.jsonl", "".join(json.dumps(row.as_json()) + "\n" for row in problems))
    write_durably(out / "report.html", report(settings, rows, compared, left_out, scorer))
    return results | {"table": rows}


def _with_thoughts_opened(task: Task) -> Task:
    """Return the task that grades texts whose thoughts the prompt opened: they may be cut off there."""
    return replace(task, grader=lambda problem, texts: task.grade(problem, [f"<think>{t}" for t in texts]))


def _choice(settings: Mapping[str, Any], path: str) -> TaskChoice:
    for name, kinds in _KINDS.items():
        if name not in settings:
            raise ValueError(f"{path} lacks {name!r}")
        if type(settings[name]) not in kinds:
            raise ValueError(f"{path}: {name} is {settings[name]!r}, expected {kinds[0].__name__}")
    return TaskChoice(*(settings[name] for name in _KINDS))


def _first_model(settings: Mapping[str, Any], out: Path) -> Path:
    for name, value in settings.items():
        if (name == "model" or name.startswith("dms ")) and isinstance(value, list) and value:
            return Path(str(value[0]))
    raise ValueError(f"{out}/{SETTINGS} names no checkpoint")
