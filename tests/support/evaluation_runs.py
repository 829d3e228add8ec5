"""Runs of `evaluate run` on three problems of the tiny reasoner, and what they leave behind."""

import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.support.exported_models import BASE, export_with_tokenizer
from tests.support.tools import Done, run_tool

PROBLEMS = 3
RUNS = ["--methods", "vanilla,tova,dms", "--budgets", "2-12-1,1-12-1,2-12-4", "--seeds", "0,7"]


def evaluate(*words: object) -> Done:
    """Run the tool `evaluate` with these words."""
    return run_tool("evaluate", *words)


class Inputs(NamedTuple):
    """A folder with a plain model, a DMS model, and problems."""

    folder: Path
    model: Path
    dms: Path
    data: Path

    def run(self, out: Path, *options: object, runs: list[str] = RUNS) -> Done:
        arguments = ["--task", "tiny_reasoner", "--data", self.data, "--model", self.model, "--out", out]
        dms = ["--dms", f"4={self.dms}"] if "dms" in runs[1] else []
        more = ["--batch-size", 2, "--device", "cpu", *runs, *dms, *options]
        return evaluate("run", *arguments, *more)


def make_inputs(folder: Path) -> Inputs:
    """Write the tiny reasoner, a random DMS model with its tokenizer, and 3 problems: batches of 2 and 1."""
    from problems import generate

    shutil.copytree(BASE, folder / "plain")
    export_with_tokenizer(folder / "run_model")
    lines = [json.dumps(item) + "\n" for item in itertools.islice(generate("heldout", 3), PROBLEMS)]
    (folder / "problems.jsonl").write_text("".join(lines))
    return Inputs(folder, folder / "plain", folder / "run_model", folder / "problems.jsonl")


def samples(out: Path) -> dict[str, list[dict]]:
    """Return the lines of each file of samples, without the seconds that a clock measured."""
    found = {}
    for file in (out / "samples").iterdir():
        found[file.name] = [json.loads(line) for line in file.read_text().splitlines()]
        for line in found[file.name]:
            assert line["batch"].pop("seconds") > 0
    return found


def refused(done: Done, message: str) -> None:
    """Check that a tool refused its input in one line, with nothing on stdout."""
    assert done.status == 2 and done.out == "", done
    assert done.errors[-1].startswith("error: ") and message in done.errors[-1], done.error
    assert not any(line.startswith(("Traceback", "error: ")) for line in done.errors[:-1]), done.error
