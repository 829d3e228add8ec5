"""`score` on samples without a model: what it executes, what it says first, and thoughts that were cut."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_dms.evaluation import code_answers
from megatron_dms.evaluation.answer_text import opens_thoughts
from megatron_dms.evaluation.evaluation_run import problems_mark
from megatron_dms.evaluation.results import score
from megatron_dms.evaluation.tasks import load_task
from tests.support.evaluation_samples import batch, sample
from tests.support.task_cases import AIME, write
from tests.support.tools import run_tool

CODE = {
    "question_id": "a",
    "question_content": "Add.",
    "starter_code": "",
    "contest_date": "2024-08-15T00:00:00",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": "[]",
    "metadata": "{}",
}
ADD = "```python\nprint(sum(map(int, input().split())))\n```"


def evaluation(folder: Path, name: str, row: dict[str, Any], text: str, **settings: Any) -> Path:
    """Write the settings and one sample of an evaluation that has run."""
    data = write(folder / "test.jsonl", [row])
    task = load_task(name, data, **settings.get("task_options", {}))
    out = folder / "out"
    (out / "samples").mkdir(parents=True)
    mark = problems_mark(task)
    found = {"task": name, "data": str(data), "limit": None, "task_options": {}, "problems": mark}
    (out / "settings.json").write_text(json.dumps(found | settings))
    line = json.dumps(asdict(sample(task.problems[0].id, [text], batch())))
    (out / "samples" / "vanilla-1-8-1-seed0.jsonl").write_text(line + "\n")
    return out


def test_score_says_that_it_executes_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: programs that are executed without a word, consent to run without a sandbox that a folder
    remembers, a flag that has no effect on another task."""
    out = evaluation(tmp_path, "livecodebench", CODE, ADD, task_options={"sandbox": "none"})
    said: list[str] = []
    rows = score(out, None, said.append, sandbox=False)["rows"]
    assert rows[0]["accuracy"]["mean"] == 1.0
    assert len(said) == 1 and "executes the generated programs WITHOUT a sandbox" in said[0]
    if code_answers.sandbox_refusal() is None:
        done = run_tool("evaluate", "score", "--out", out)
        assert done.status == 0 and "executes the generated programs, each in a sandbox" in done.errors[0]
    monkeypatch.setattr("megatron_dms.evaluation.tasks.livecodebench.sandbox_refusal", lambda: "found none")
    with pytest.raises(ValueError, match="found none"):
        score(out, None, said.append)
    out = evaluation(tmp_path / "other", "aime24", AIME[0], r"\boxed{33}")
    with pytest.raises(ValueError, match="--no-sandbox has no effect: task aime24 executes no programs"):
        score(out, None, said.append, sandbox=False)


@pytest.mark.parametrize(("opened", "right"), [(True, 0.0), (False, 1.0)])
def test_thoughts_that_the_prompt_opened(tmp_path: Path, opened: bool, right: float) -> None:
    """Catches: a number in thoughts that were cut off, where the chat template opened the thoughts."""
    text = r"Suppose it is \boxed{33}. No, that"
    out = evaluation(tmp_path, "aime24", AIME[0], text, texts_begin_in_thoughts=opened)
    assert score(out, None, lambda line: None)["rows"][0]["accuracy"]["mean"] == right
    assert opens_thoughts("<|user|>Think <think>a</think><|assistant|><think>\n")
    assert not opens_thoughts("<think>\n\n</think>\n\n") and not opens_thoughts("<think> is a tag")
