"""LiveCodeBench, code generation: a program must pass all public and private tests of a problem.

code_answers.py runs the programs; its docstring says what it does not protect against.
"""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from pathlib import Path
from typing import Any

from megatron_dms.evaluation.code_answers import WITHOUT_SANDBOX, Verdict, check_code, sandbox_refusal
from megatron_dms.evaluation.code_blocks import extract_code
from megatron_dms.evaluation.tasks.code_tests import CodeTests
from megatron_dms.evaluation.tasks.dataset_files import DatasetRow, problems_of, read_rows
from megatron_dms.evaluation.tasks.source import data_files, find_files, unreachable
from megatron_dms.evaluation.tasks.task import Grades, Problem, Task, ask, grades_of

REPOSITORY = "livecodebench/code_generation_lite"
RELEASES = range(1, 7)
"""Release n consists of the first n of the files test.jsonl, test2.jsonl, ..."""
INSTRUCTION = (
    "Think the problem through, then give the whole program in one block that starts with ```python."
)
FROM_INPUT = "Write a Python program that reads from standard input and prints the answer to standard output."
FROM_STARTER = "Write Python code that completes this starter code; keep its names and arguments:"

_NOTICES = {
    "required": "grading executes the generated programs, each in a sandbox without network",
    "none": (
        "grading executes the generated programs WITHOUT a sandbox, as this user: with its files, the "
        "evaluator's environment and the network"
    ),
}


def livecodebench(
    source: Path | None,
    limit: int | None,
    tokenizer: Any = None,
    *,
    since: str | date | None = None,
    until: str | date | None = None,
    release: int | None = None,
    workers: int = 1,
    sandbox: str = "required",
) -> Task:
    """Load LiveCodeBench.

    Args:
        source: a file, a folder with test.jsonl, test2.jsonl, ..., or a folder with a single set of other
            files; None for the hub.
        since, until: first and last day of the contests as YYYY-MM-DD; both days are included.
        release: number of files to take, 1 to 6; None for all files in the folder, and for 6 from the hub.
        workers: number of programs that run at a time. More workers than free cores make programs time out.
        sandbox: "required", or "none" to run the programs as this user (see code_answers.py).

    Raises:
        ValueError: an option is out of range, the source or a row is not as documented, no contest lies
            between the two days, or a sandbox is required and the system allows none.
    """
    first, last = _day("since", since), _day("until", until)
    if first and last and first > last:
        raise ValueError(f"found since {first}, until {last}; expected since to be no later")
    if release is not None and release not in RELEASES:
        raise ValueError(f"found release {release}, expected {RELEASES[0]} to {RELEASES[-1]}")
    if workers < 1:
        raise ValueError(f"found workers {workers}, expected at least 1")
    if sandbox not in _NOTICES:
        raise ValueError(f"found sandbox {sandbox!r}, expected one of {', '.join(_NOTICES)}")
    if sandbox == "required" and (refusal := sandbox_refusal()):
        raise ValueError(f"{refusal}; {WITHOUT_SANDBOX}")

    days: set[date] = set()

    def make(row: DatasetRow) -> Problem | None:
        names = ("question_id", "question_content", "starter_code", "contest_date", "public_test_cases")
        row.require(*names, "private_test_cases", "metadata")
        day = _contest_day(row)
        days.add(day)
        if (first and day < first) or (last and day > last):
            return None
        tests = CodeTests(
            row.where, row.text("public_test_cases"), row.text("private_test_cases"), _function(row)
        )
        tests.unpack()  # shows bad tests now and not after hours of generation
        return Problem(row.label("question_id"), ask(_prompt(row)), tests)

    problems = problems_of(read_rows(_files(source, release)), make, limit)
    if not problems:
        raise ValueError(
            f"found contests from {min(days)} to {max(days)}, expected some from {first or 'the first'} to "
            f"{last or 'the last'}"
        )

    sandboxed = sandbox == "required"

    def grade(problem: Problem, texts: Sequence[str]) -> Grades:
        programs = [extract_code(text) for text in texts]
        tests = problem.gold.unpack()
        distinct = {
            program: text for program, text in zip(programs, texts, strict=True) if program is not None
        }
        with ThreadPoolExecutor(workers) as pool:
            results = list(
                pool.map(lambda text: check_code(text, tests, sandbox=sandboxed), distinct.values())
            )
        passed = {
            program: result.verdict is Verdict.PASSED
            for program, result in zip(distinct, results, strict=True)
        }
        return grades_of(programs, lambda program: passed[program])

    return Task("livecodebench", False, problems, grade, _NOTICES[sandbox])


def _files(source: Path | None, release: int | None) -> Iterator[Path]:
    names = ["test.jsonl", *(f"test{number}.jsonl" for number in RELEASES[1:])]
    if source is None:
        return _downloaded(names[:release])
    if source.is_file() and release is not None:
        raise ValueError(f"found release {release} and the file {source}, expected a folder for a release")
    own = [] if source.is_file() else [file for file in data_files(source) if file.name in names]
    if not own:
        if release is not None:
            return iter(find_files(source, "test", f"release_v{release}"))  # as mirrors name their folders
        return iter(find_files(source, "test"))
    wanted = names[: release or max(names.index(file.name) for file in own) + 1]
    missing = [name for name in wanted if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} missing; expected {', '.join(wanted)}")
    return iter([source / name for name in wanted])


def _downloaded(names: Sequence[str]) -> Iterator[Path]:
    """Download the files one by one: `datasets` no longer runs the loading script of this dataset."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ValueError(f"{REPOSITORY} needs `pip install huggingface_hub`, or give a folder") from error
    for name in names:
        try:
            path = hf_hub_download(REPOSITORY, name, repo_type="dataset")
        except Exception as error:  # several libraries raise here: offline, no such file, a full disk
            raise unreachable(REPOSITORY, error) from error
        yield Path(path)


def _day(option: str, value: str | date | None) -> date | None:
    if value is None or isinstance(value, date):
        return value
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        raise ValueError(f"found {option} {value!r}, expected a day as YYYY-MM-DD")
    try:
        return date.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"found {option} {value!r}, expected a day as YYYY-MM-DD") from error


def _contest_day(row: DatasetRow) -> date:
    value = row.fields["contest_date"]
    try:
        return (value if isinstance(value, datetime) else datetime.fromisoformat(value)).date()
    except (TypeError, ValueError) as error:
        raise row.error(
            f"column contest_date: found {value!r}, expected a time such as 2024-08-01T00:00:00"
        ) from error


def _function(row: DatasetRow) -> str | None:
    text = row.text("metadata")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise row.error(f"column metadata is not JSON: {error}") from error
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if name is not None and not isinstance(name, str):
        raise row.error(f"column metadata: found func_name {name!r}, expected a name")
    return name


def _prompt(row: DatasetRow) -> str:
    starter = row.get("starter_code", str)
    wanted = f"{FROM_STARTER}\n\n```python\n{starter.rstrip()}\n```" if starter.strip() else FROM_INPUT
    return f"{row.text('question_content').strip()}\n\n{wanted}\n\n{INSTRUCTION}"
