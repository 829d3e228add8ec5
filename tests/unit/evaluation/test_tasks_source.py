"""Which files the rows of a folder come from, the hub, and files that are not as they should be."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dms.evaluation.tasks import load_task
from megatron_dms.evaluation.tasks.source import find_files

ROWS = [{"problem": f"{n}?", "answer": str(n), "unique_id": f"test/{n}"} for n in range(3)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return folder


SHARDS = [f"test-{n:05}-of-00002.parquet" for n in range(2)]
# Files, split, config, which are taken.
FOLDERS: dict[str, tuple[list[str], str, str | None, list[str]]] = {
    "math500": (["README.md", "test.jsonl", ".cache/x/test.jsonl"], "test", None, ["test.jsonl"]),
    "gpqa": (
        ["gpqa_main.csv", "gpqa_diamond.csv", "gpqa_extended.csv", "gpqa_experts.csv"],
        "train",
        "gpqa_diamond",
        ["gpqa_diamond.csv"],
    ),
    "gsm8k": (
        [f"{c}/{s}-00000-of-00001.parquet" for c in ("main", "socratic") for s in ("train", "test")],
        "test",
        "main",
        ["main/test-00000-of-00001.parquet"],
    ),
    "own folder": (["train.jsonl", "test.jsonl"], "test", "main", ["test.jsonl"]),
    "shards": (SHARDS[::-1], "test", None, SHARDS),
    "no split": (
        ["aime_2024_problems.parquet", "dataset_infos.json"],
        "train",
        None,
        ["aime_2024_problems.parquet"],
    ),
    "short name": (
        ["hellaswag_train.jsonl", "hellaswag_val.jsonl"],
        "validation",
        None,
        ["hellaswag_val.jsonl"],
    ),
}
REFUSED: dict[str, tuple[list[str], str, str | None, str]] = {
    "other split": (["train.jsonl"], "test", None, "found train.jsonl, expected one file of the split test"),
    "short name": (["x_val.jsonl"], "test", None, "found x_val.jsonl, expected one file of the split test"),
    "two shards": (
        [f"{c}/test-00000-of-00001.parquet" for c in ("anatomy", "zoology")],
        "test",
        None,
        "found anatomy/test-00000-of-00001.parquet, zoology/.*; give the file",
    ),
    "subjects": (["anatomy/test.jsonl"], "test", "all", "found anatomy/test.jsonl, expected .* of all"),
    "two": (["a/test.csv", "b/test.csv"], "test", None, "found a/test.csv, b/test.csv, expected one file"),
    "formats": (["test.csv", "test.jsonl"], "test", None, "found test.csv, test.jsonl, expected one"),
    "other config": (
        ["gpqa_main.csv"],
        "train",
        "gpqa_diamond",
        "split train of gpqa_diamond; give the file",
    ),
    "config's neighbour": (["ARC-Easy/test.jsonl"], "test", "ARC-Challenge", "split test of ARC-Challenge"),
    "a shard": (SHARDS[1:], "test", None, "found 1 shards of 00002, expected all"),
    "nothing": (["README.md"], "test", None, "has no data; expected a file that ends in one of .jsonl"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case: str, tmp_path: Path) -> None:
    """Catches: the training split, another config, shards out of order, the download's own records."""
    files, split, config, taken = FOLDERS[case]
    make(tmp_path, *files)
    assert find_files(tmp_path, split, config) == [tmp_path / name for name in taken]


@pytest.mark.parametrize("case", REFUSED)
def test_folders_refused(case: str, tmp_path: Path) -> None:
    """Catches: the first of several, whatever there is instead of what was meant, part of a dataset."""
    files, split, config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        find_files(make(tmp_path, *files), split, config)


def test_rows_go_on_over_shards(tmp_path: Path) -> None:
    """Catches: row numbers, which are ids, that start anew in each file."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"question": "?", "answer": f"#### {n}"} for n in range(4)]
    for name, part in zip(SHARDS, (rows[:2], rows[2:]), strict=True):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / name)
    problems = load_task("gsm8k", tmp_path).problems
    assert [(problem.id, problem.gold) for problem in problems] == [(f"gsm8k-{n}", str(n)) for n in range(4)]


WRONG: dict[str, tuple[str, bytes, str]] = {
    "empty": ("x.jsonl", b"", "x.jsonl is empty; expected at least one row"),
    "blank": ("x.jsonl", b"\n \n", "x.jsonl is empty"),
    "empty list": ("x.json", b"[]", "x.json is empty"),
    "header alone": ("x.csv", b"problem,answer,unique_id\n", "x.csv is empty"),
    "not JSON": ("x.jsonl", lines(ROWS[:1]).encode() + b"{", "x.jsonl, line 2 is not JSON"),
    "no object": ("x.jsonl", b"[1]\n", r"x.jsonl, line 1: found \[1\], expected an object"),
    "cut list": ("x.json", b"[{}", "x.json is not JSON"),
    "Latin-1": ("x.jsonl", b'{"problem": "\xe9"}', "x.jsonl is not UTF-8"),
    "short row": ("x.csv", b"problem,answer,unique_id\n1,2\n", "x.csv, up to line 2: found a row of another"),
    "long row": ("x.csv", b"problem,answer,unique_id\n1,2,3\n1,2,3,4\n", "x.csv, up to line 3: found a row"),
    "quotes": ("x.csv", b'problem,answer,unique_id\n"1" 2,2,3\n', "x.csv, after line 1:"),
    "no gzip": ("x.jsonl.gz", lines(ROWS).encode(), "x.jsonl.gz cannot be read"),
    "cut gzip": ("x.jsonl.gz", gzip.compress(lines(ROWS).encode())[:-9], "x.jsonl.gz cannot be read"),
    "no parquet": ("x.parquet", b"PAR1", "x.parquet cannot be read"),
    "format": ("x.txt", b"1", "x.txt, expected a name that ends in one of"),
    "columns": (
        "x.csv",
        b"a,b\n1,2\n",
        "column problem, answer, unique_id missing; found a, b, expected problem",
    ),
    "type": ("x.jsonl", lines([ROWS[0] | {"problem": 1}]).encode(), "column problem: found 1, expected str"),
    "blank text": (
        "x.jsonl",
        lines([ROWS[0] | {"answer": " "}]).encode(),
        "column answer: found a blank text",
    ),
    "ids": (
        "x.jsonl",
        lines([*ROWS, ROWS[1]]).encode(),
        "x.jsonl, line 4: found id 'test/1' again, expected another than at .*x.jsonl, line 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    """Catches: errors of libraries instead of one line that names the file; rows that are skipped."""
    name, data, message = WRONG[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        load_task("math500", tmp_path / name)
    assert type(raised.value) is ValueError and "\n" not in str(raised.value)


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist; expected a file or a folder"):
        load_task("math500", tmp_path / "nowhere")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right repository, config and split are asked for; a failure is one line that says what to do.

    Catches: configs or splits that differ from those of the files, an error of many lines.
    """
    asked: list[tuple[Any, ...]] = []

    def load_dataset(repository: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((repository, config, split))
        if repository != "HuggingFaceH4/MATH-500":
            raise ConnectionError("Couldn't reach\n  the hub")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [problem.gold for problem in load_task("math500", limit=2).problems] == ["0", "1"]
    for name in ("aime24", "gsm8k", "gpqa", "mmlu", "arc", "hellaswag"):
        with pytest.raises(
            ValueError, match=r"from the hub \(ConnectionError: Couldn't reach the hub\); dow"
        ):
            load_task(name)
    assert asked == [
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("openai/gsm8k", "main", "test"),
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        ("cais/mmlu", "all", "test"),
        ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ("Rowan/hellaswag", None, "validation"),
    ]
