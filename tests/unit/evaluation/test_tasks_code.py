"""LiveCodeBench: tests from its packed rows, the time window, releases, and programs graded."""

import base64
import json
import os
import pickle
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dms.evaluation.code_answers import CallTest, StdinTest
from megatron_dms.evaluation.tasks import load_task

STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
HIDDEN = [{"input": "é 5\n" * 2, "output": "10\n", "testtype": "stdin"}]
CALLS = [{"input": '[1, 2]\n"a"', "output": '["a", 3]', "testtype": "functional"}]


def pack(value: Any) -> str:
    """Pack tests as the dataset does: pickled, compressed, base64."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def row(number: int, day: str = "2024-08-15", **changes: Any) -> dict[str, Any]:
    return {
        "question_title": "Add",
        "question_content": "Add the numbers.",
        "platform": "atcoder",
        "question_id": f"abc{number}_a",
        "contest_id": f"abc{number}",
        "contest_date": f"{day}T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(STDIN),
        "private_test_cases": pack(json.dumps(HIDDEN)),
        "metadata": "{}",
    } | changes


CALLED = {
    "starter_code": "class Solution:\n    def f(self, a: List[int], b: str) -> list:\n        ",
    "public_test_cases": json.dumps(CALLS),
    "private_test_cases": json.dumps(CALLS),
    "metadata": json.dumps({"func_name": "f"}),
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    return path


def fenced(code: str) -> str:
    return f"<think>```python\nprint(0)\n```</think>\n```python\n{code}\n```"


def test_tests_and_grades(tmp_path: Path) -> None:
    """Catches: private tests left out, arguments that are not split at lines, a vote, a program's tests by
    those of another, a starter that the prompt does not show."""
    path = write(tmp_path / "test.jsonl", row(1), row(2, **CALLED))
    task = load_task("livecodebench", path, workers=2)
    assert not task.by_vote and [problem.id for problem in task.problems] == ["abc1_a", "abc2_a"]
    first, second = task.problems
    assert first.gold.unpack() == [StdinTest("1 2\n", "3\n"), StdinTest("é 5\né 5\n", "10\n")]
    assert second.gold.unpack() == [CallTest("f", [[1, 2], "a"], ["a", 3])] * 2
    assert "standard input" in first.messages[0]["content"] and "Solution" in second.messages[0]["content"]

    everything = "import sys\nprint(sum(int(w) for w in sys.stdin.read().split() if w.isdigit()))"
    public_only = "print(sum(map(int, input().split())))"
    grades = task.grade(first, [fenced(public_only), fenced(everything), "no code", fenced(public_only)])
    assert grades.correct == [False, True, False, False] and grades.classes == [0, 1, None, 0]
    assert grades.chains[1].answer == everything + "\n" and task.solved(grades)
    assert not task.solved(task.grade(first, [fenced(public_only)]))
    solution = "class Solution:\n    def f(self, a: List[int], b: str) -> list:\n        return [b, sum(a)]"
    assert task.grade(second, [fenced(solution), fenced(everything)]).correct == [True, False]


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    """Catches: pickle.loads; a check that comes after the pickle has run."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Malice(mark)))
    assert mark.exists()
    mark.unlink()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        packed = base64.b64encode(zlib.compress(pickle.dumps(Malice(mark), protocol))).decode()
        path = write(tmp_path / "x.jsonl", row(1), row(2, private_test_cases=packed))
        with pytest.raises(ValueError, match=r"x.jsonl, line 2: tests: found .* in the pickle.*refused"):
            load_task("livecodebench", path)
        assert not mark.exists()


def test_every_pickle_of_a_text_is_read(tmp_path: Path) -> None:
    text = json.dumps(HIDDEN) + " " * 100_000
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        packed = base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()
        path = write(tmp_path / "x.jsonl", row(1, private_test_cases=packed))
        assert len(load_task("livecodebench", path).problems[0].gold.unpack()) == 2


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"private_test_cases": pack(["a", "b"])}, "found EMPTY_LIST in the pickle"),
    "number": ({"private_test_cases": pack(3)}, "found BININT1 3 in the pickle"),
    "base64": ({"private_test_cases": "?"}, "neither JSON nor packed"),
    "zlib": ({"private_test_cases": "YWJj"}, "neither JSON nor packed"),
    "cut": (
        {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-5]).decode()},
        "cut short or of more than",
    ),
    "cut pickle": (
        {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps("[]")[:-3])).decode()},
        "line 1: tests:",
    ),
    "no JSON": ({"public_test_cases": "[{"}, "line 1: tests: "),
    "deep": ({"public_test_cases": "[" * 100_000}, "line 1: tests: "),
    "no list": ({"public_test_cases": "{}"}, "found '{}', expected a list"),
    "no tests": ({"public_test_cases": "[]", "private_test_cases": "[]"}, "found no tests"),
    "no function": (CALLED | {"metadata": "{}"}, "metadata without func_name"),
    "kind": ({"public_test_cases": json.dumps([STDIN[0] | {"testtype": "x"}])}, "found testtype 'x'"),
    "no output": (
        {"public_test_cases": '[{"input": ""}]'},
        "expected an object with the texts input, output",
    ),
    "metadata": ({"metadata": "{"}, "column metadata is not JSON"),
    "day": ({"contest_date": "soon"}, "column contest_date: found 'soon'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows(case: str, tmp_path: Path) -> None:
    """Catches: tests that are found to be broken only after the programs were generated."""
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=f"x.jsonl, line 1: .*{message}|x.jsonl, {message}"):
        load_task("livecodebench", write(tmp_path / "x.jsonl", row(1, **changes)))


def test_window(tmp_path: Path) -> None:
    """Catches: an end that is left out, a limit that counts rows outside, an empty task."""
    days = ("2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01")
    path = write(tmp_path / "x.jsonl", *(row(number, day) for number, day in enumerate(days)))
    task = load_task("livecodebench", path, since="2024-08-01", until="2025-01-31")
    assert [problem.id for problem in task.problems] == ["abc1_a", "abc2_a"]
    assert [p.id for p in load_task("livecodebench", path, 1, since="2024-08-01").problems] == ["abc1_a"]
    for options, message in (
        (
            {"since": "2026-01-01"},
            "found contests from 2024-07-31 to 2025-02-01, expected some from 2026-01-01",
        ),
        ({"since": "2025-01-01", "until": "2024-01-01"}, "expected since to be no later"),
        ({"since": "08/2024"}, "found since '08/2024', expected a day as YYYY-MM-DD"),
        ({"until": "2024-02-31"}, "found until '2024-02-31'"),
        ({"workers": 0}, "found workers 0"),
        ({"release": 9}, "found release 9, expected 1 to 6"),
        ({"release": 1}, "found release 1 and the file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task("livecodebench", path, **options)


def test_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a release taken for its last file alone, a file of it that is missing, test10 before test2."""
    for number, name in enumerate(("test.jsonl", "test2.jsonl", "test3.jsonl")):
        write(tmp_path / name, row(number))
    assert [p.id for p in load_task("livecodebench", tmp_path).problems] == ["abc0_a", "abc1_a", "abc2_a"]
    assert len(load_task("livecodebench", tmp_path, release=2).problems) == 2
    with pytest.raises(
        ValueError, match=r"test4.jsonl missing; expected test.jsonl, test2.jsonl, test3.jsonl"
    ):
        load_task("livecodebench", tmp_path, release=4)

    asked = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        if not (tmp_path / name).exists():
            raise ConnectionError("offline")
        return str(tmp_path / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    assert len(load_task("livecodebench", release=3).problems) == 3
    assert asked[2] == ("livecodebench/code_generation_lite", "test3.jsonl", "dataset")
    with pytest.raises(ValueError, match=r"code_generation_lite cannot be loaded from the hub .*offline"):
        load_task("livecodebench")
    (tmp_path / "test2.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test2.jsonl missing"):
        load_task("livecodebench", tmp_path)
    mirror = tmp_path / "mirror" / "release_v5"
    mirror.mkdir(parents=True)
    write(mirror / "test.json", row(7))
    write(tmp_path / "mirror" / "release_v6.json", row(8))
    problems = load_task("livecodebench", tmp_path / "mirror", release=5).problems
    assert [problem.id for problem in problems] == ["abc7_a"]
