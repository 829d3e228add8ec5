"""GPQA, MMLU, ARC and HellaSwag: the options' order, and the letters that count."""

from collections import Counter
from pathlib import Path

import pytest

from megatron_dms.evaluation.tasks import load_task
from tests.support.task_cases import ARC, HELLASWAG, MMLU, graded, question, write


def gpqa_file(path: Path, ids: list[str]) -> Path:
    """Write rows as on the hub: other columns first, texts with commas, quotes and line ends."""
    names = [
        "Canary String",
        "Question",
        "Correct Answer",
        *(f"Incorrect Answer {n}" for n in (1, 2, 3)),
        "Record ID",
    ]
    lines = [",".join(names)]
    lines += [f'x,"Two lines,\nand ""quotes""?",right\n,"wrong, 1",wrong 2,wrong 3,{name}' for name in ids]
    text = "\n".join(lines).replace("right\n", '"right\n"') + "\n"
    path.write_text("﻿" + text, encoding="utf-8")
    return path


def test_gpqa_order(tmp_path: Path) -> None:
    """The order is a function of seed and record id, and each letter is as often right.

    Catches: the right answer always first, an order that depends on other rows or on the run, a seed that is
    not used.
    """
    ids = [f"rec{number:04}" for number in range(400)]
    task = load_task("gpqa", gpqa_file(tmp_path / "gpqa_diamond.csv", ids))
    assert question(task).startswith('Two lines,\nand "quotes"?\n\nA) ') and "wrong, 1\n" in question(task)
    for problem in task.problems[:8]:
        assert f"\n{problem.gold['letter']}) right\n" in problem.messages[0]["content"]
    letters = [problem.gold["letter"] for problem in task.problems]
    counts = Counter(letters)
    assert set(counts) == set("ABCD") and max(counts.values()) < 130 and min(counts.values()) > 70
    assert "".join(letters[:12]) == "DCDAACCCCDBA"  # also on another machine
    alone = load_task("gpqa", gpqa_file(tmp_path / "one.csv", ids[7:8]))
    assert alone.problems[0] == task.problems[7]
    other = load_task("gpqa", tmp_path / "gpqa_diamond.csv", seed=1)
    same = sum(a.gold == b.gold for a, b in zip(task.problems, other.problems, strict=True))
    assert 60 < same < 140
    gold = letters[0]
    assert graded(task, f"Hm.\nAnswer: {gold}", "Answer: Z", "so\n**B**")[:2] == [(gold, True), (None, False)]


def test_mmlu_arc_hellaswag(tmp_path: Path) -> None:
    """Catches: an index that counts from 1, labels of digits, a fifth option, marks left in the text."""
    task = load_task("mmlu", write(tmp_path / "mmlu.jsonl", MMLU))
    assert [problem.id for problem in task.problems] == ["anatomy-0", "anatomy-1"]
    assert "\nC) y\n" in question(task) and "one of A, B, C, D." in question(task)
    assert graded(task, "Answer: C", "Answer: B") == [("C", True), ("B", False)]
    task = load_task("arc", write(tmp_path / "arc.jsonl", ARC))
    assert "\nC) r\n\n" in question(task) and graded(task, "Answer: C", "Answer: D") == [
        ("C", True),
        (None, False),
    ]
    assert graded(task, "Answer: E", index=1) == [("E", True)]
    task = load_task("hellaswag", write(tmp_path / "hellaswag_val.jsonl", HELLASWAG))
    assert "How to fix. Take a tool. A man\n\nA) sings.\nB) works.\n" in question(task)
    assert graded(task, "Answer: B") == [("B", True)]
    for name, row, message in (
        ("mmlu", MMLU[0] | {"answer": 4}, "column answer: found 4, expected 0 to 3"),
        ("mmlu", MMLU[0] | {"choices": "wxyz"}, "column choices: found wxyz, expected a list"),
        ("arc", ARC[0] | {"answerKey": "A"}, "found answerKey 'A' and labels"),
        (
            "hellaswag",
            HELLASWAG[0] | {"label": ""},
            "column label: found '', expected 0 to 3; the test split has no labels",
        ),
    ):
        with pytest.raises(ValueError, match=f"x.jsonl, line 1: {message}"):
            load_task(name, write(tmp_path / "x.jsonl", [row]))
