"""Problems in the datasets' own formats: what is asked, and which answers count."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_dms.evaluation.tasks import TASKS, Graded, Problem, load_task
from tests.support.task_cases import AIME, CHAT, FORMATS, GSM8K, MATH, graded, question, write
from tests.support.tools import run_python


def test_the_names_come_without_the_tasks() -> None:
    """Catches: imports of what a task needs where only the names are."""
    code = (
        "import sys, megatron_dms.evaluation.tasks as t; "
        "heavy = ('datasets', 'torch', 'pyarrow', 'sympy', 'transformers'); "
        "print(len(t.TASKS), [n for n in heavy if n in sys.modules], 'math_verify' in sys.modules)"
    )
    done = run_python("-c", code)
    assert done.status == 0, done.error
    assert done.out.split("\n")[0] == f"{len(TASKS)} [] False"


def test_math500(tmp_path: Path) -> None:
    """Catches: the first brace as a box's end, answers as texts, units that count, a vote by text."""
    task = load_task("math500", write(tmp_path / "test.jsonl", MATH))
    assert [problem.id for problem in task.problems] == [f"test/algebra/{n}.json" for n in (1, 3, 2)]
    assert question(task).startswith("Half of one?\n") and "\\boxed{}" in question(task)
    texts = [
        r"\boxed{\frac{1}{2}}",
        r"\boxed{3}",
        r"it is \boxed{0.5}",
        "none",
        r"\boxed{\sqrt{\frac{1}{4}}}",
    ]
    grades = task.grade(task.problems[0], texts)
    assert grades.correct == [True, False, True, False, True]
    assert grades.classes == [0, 1, 0, None, 0] and task.solved(grades)
    assert grades.chains[0] == Graded(r"\frac{1}{2}", True) and grades.chains[3] == Graded(None, False)
    assert graded(task, r"\boxed{12}", r"\boxed{12\text{ m}}", r"\boxed{13}", index=2) == [
        ("12", True),
        (r"12\text{ m}", True),
        ("13", False),
    ]
    assert task.grade(task.problems[1], [r"\boxed{\sqrt{12}}", r"\boxed{2}"]).correct == [True, False]
    assert not task.solved(task.grade(task.problems[0], [r"\boxed{3}", r"\boxed{3}", r"\boxed{0.5}"]))
    with pytest.raises(ValueError, match=r"algebra/1.json: found no texts"):
        task.grade(task.problems[0], [])


def test_aime24(tmp_path: Path) -> None:
    """Catches: leading zeros that count, the other repository's columns, a number without a box as answer."""
    task = load_task("aime24", write(tmp_path / "a.jsonl", AIME))
    assert (task.problems[0].id, task.problems[0].gold, task.by_vote) == ("60", 33, True)
    assert graded(task, r"\boxed{33}", r"\boxed{033}", "33", r"\boxed{34}") == [
        ("33", True),
        ("33", True),
        (None, False),
        ("34", False),
    ]
    other = {"ID": "2024-II-4", "Problem": "Find m+n.", "Solution": "", "Answer": 7}
    task = load_task("aime24", write(tmp_path / "b.json", [other]))
    assert task.problems[0].id == "2024-II-4" and graded(task, r"\boxed{7}") == [("7", True)]
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: column answer: found '1000', expected a whole"):
        load_task("aime24", write(tmp_path / "a.jsonl", [AIME[0] | {"answer": "1000"}]))


def test_gsm8k(tmp_path: Path) -> None:
    """Catches: thousands separators, currencies and units that count, a list as a number, mere mentions."""
    task = load_task("gsm8k", write(tmp_path / "gsm8k_test.jsonl", GSM8K))
    assert [problem.gold for problem in task.problems] == ["72", "1234"]
    right = [r"\boxed{\$1,234}", r"\boxed{1234.00 \text{ dollars}}", "The answer is $1{,}234$? #### 1,234"]
    right += [r"\boxed{1000 + 234 = 1\,234}", r"\boxed{1234 dollars}", "**Answer:** \\$1,234, as said."]
    wrong = [r"\boxed{1,2,34}", r"\boxed{12,34}", "It is 1234", r"\boxed{\frac{1234}{1}}", r"\boxed{}"]
    assert graded(task, *right, index=1) == [("1234", True)] * 6
    other = [
        r"\boxed{1 234}",
        "#### 1~234",
        r"\boxed 1234",
        r"\boxed{1234 m^2}",
        r"\boxed{1234 \text{ cm}^3}",
    ]
    other += ["The answer is 1000 + 234 = 1234.", "The answer is €1234", r"\boxed{1234 miles per hour}"]
    assert graded(task, *other, index=1) == [("1234", True)] * 8
    none = [
        r"\boxed{\sqrt{1234}}",
        r"\boxed{1234!}",
        "The answer is 1234/5",
        "The answer is 1234:5",
        r"\boxed{1234x}",
    ]
    none += [
        "The answer is 1234-1240",
        "The answer is 3 hundred",
        r"\boxed{1234} or \boxed{5}",
        r"<think>\boxed{1234}",
    ]
    assert graded(task, *none, index=1) == [(None, False)] * 9
    minus = [r"\boxed{- 1234}", "\\boxed{\u22121234}", "The answer is - 1234", r"\boxed{-\$1234}"]
    assert graded(task, *minus, index=1) == [("-1234", False)] * 4
    assert graded(task, *wrong, r"\boxed{-1234}", index=1) == [(None, False)] * 5 + [("-1234", False)]
    with pytest.raises(
        ValueError, match="line 1: column answer: found 'seventy' at its end, expected #### and a number"
    ):
        load_task("gsm8k", write(tmp_path / "x.jsonl", [{"question": "?", "answer": "seventy"}]))


def test_tiny_reasoner(tmp_path: Path) -> None:
    """Catches: the assistant's turn left in the prompt, an answer that is not the last thing said."""
    task = load_task("tiny_reasoner", write(tmp_path / "heldout.jsonl", CHAT))
    assert task.problems == [Problem("heldout-1-0", CHAT[0]["messages"][:2], "3")]
    assert graded(task, "a 3 ; answer 3 <|im_end|> answer 4", "answer 3 ;", "answer 4") == [
        ("3", True),
        (None, False),
        ("4", False),
    ]
    for row, message in (
        (
            CHAT[0] | {"messages": CHAT[0]["messages"][:2]},
            "found the roles system, user, expected a question",
        ),
        (CHAT[0] | {"answer": "three"}, "column answer: found 'three', expected an integer"),
    ):
        with pytest.raises(ValueError, match=f"x.jsonl, line 1: .*{message}"):
            load_task("tiny_reasoner", write(tmp_path / "x.jsonl", [row]))
    with pytest.raises(ValueError, match="found source None, expected a JSONL file"):
        load_task("tiny_reasoner")


@pytest.mark.parametrize("name", FORMATS)
def test_formats_limits_and_columns(name: str, tmp_path: Path) -> None:
    """Catches: formats that are read differently, the last rows for the first, columns not required."""
    import pyarrow
    from pyarrow import parquet

    rows = FORMATS[name]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for suffix, data in (
        (".jsonl", lines.replace("\n", "\n\n").encode("utf-8-sig")),
        (".jsonl.gz", gzip.compress(lines.encode())),
        (".json", json.dumps(rows, indent=1).encode()),
        (".parquet", None),
    ):
        path = tmp_path / f"test{suffix}"
        if data is None:
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_bytes(data)
        task = load_task(name, path)
        assert task.problems == load_task(name, write(tmp_path / "plain.jsonl", rows)).problems
        assert len(task.problems) == len(rows)
        assert load_task(name, path, limit=1).problems == task.problems[:1]
        assert json.loads(json.dumps(task.problems[0].gold)) == task.problems[0].gold
    for column in {"problem", "answer", "question", "choices", "endings", "messages"} & set(rows[0]):
        broken = {key: value for key, value in rows[0].items() if key != column}
        with pytest.raises(
            ValueError, match=f"line 1: column {column} missing; found .*, expected .*{column}"
        ):
            load_task(name, write(tmp_path / "x.jsonl", [broken]))


def test_arguments() -> None:
    """Catches: options that are dropped, or of another type (a traceback, or a seed that is a text), a limit
    that takes nothing or all but one."""
    for arguments, options, message in (
        (("aime",), {}, "found task 'aime', expected one of aime24, math500"),
        (("math500", None, 0), {}, "found limit 0"),
        (("math500",), {"seed": 1}, "task math500: found option seed, expected none"),
        (("gpqa",), {"sead": 1}, "task gpqa: found option sead, expected one of seed"),
        (("gpqa",), {"seed": "abc"}, "task gpqa: found option seed 'abc', expected a whole number"),
        (("gpqa",), {"seed": True}, "task gpqa: found option seed True, expected a whole number"),
        (("ruler_niah",), {"length": "abc"}, "option length 'abc', expected a whole number"),
        (("ruler_vt",), {"hops": "x"}, "option hops 'x', expected a whole number"),
        (("livecodebench",), {"since": 20240801}, "option since 20240801, expected a day as YYYY-MM-DD"),
        (("livecodebench",), {"workers": "x"}, "option workers 'x', expected a whole number"),
        (("livecodebench",), {"release": "x"}, "option release 'x', expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(*arguments, **options)
