"""`evaluate run` and `score`: what is refused, in one line, and what is then left untouched."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.evaluation_runs import Inputs, evaluate, make_inputs, refused, samples
from tests.support.exported_models import BASE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("refused"))


def dms_with(inputs: Inputs, folder: Path, **config: object) -> Inputs:
    """Copy the DMS model, with other entries in its config.json."""
    shutil.copytree(inputs.dms, folder)
    entries = json.loads((folder / "config.json").read_text())
    assert set(config) <= set(entries)
    (folder / "config.json").write_text(json.dumps(entries | config))
    return inputs._replace(dms=folder)


DMS = ["--methods", "vanilla,dms", "--budgets", "1-8-1,2-8-4"]


def test_achieved_cr_1_stops(inputs: Inputs, tmp_path: Path) -> None:
    """Catches: a model that never evicts shown as one that does, or stopped after hours, or in a later
    table."""
    never = dms_with(inputs, tmp_path / "never_model", dms_initial_alpha_offset=1e6)
    message = "dms-2-8-4-seed0: the achieved CR is 1 where 4 was asked for: no pair was evicted"
    refused(never.run(tmp_path / "out", runs=DMS), message)
    assert len(samples(tmp_path / "out")["dms-2-8-4-seed0.jsonl"]) == 2, "one batch shows it"
    refused(never.run(tmp_path / "out", runs=DMS), message)
    short = ["--methods", "window", "--budgets", "1-8-1.001"]
    done = inputs.run(tmp_path / "short", runs=short)
    refused(done, "the achieved CR is 1 where 1.001 was asked for")
    assert "The texts are shorter than what the budget keeps" in done.errors[-1]
    vanilla = ["--methods", "vanilla", "--budgets", "1-8-1"]
    done = inputs.run(tmp_path / "short", runs=vanilla)
    said = "left out: window-1-8-1.001-seed0, achieved CR 1"
    assert done.status == 0 and said in done.errors, done.errors
    results = json.loads((tmp_path / "short" / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["vanilla"]
    assert results["left_out"] == [said.removeprefix("left out: ")] and "window" not in done.out.split("{")[0]
    assert f"<li>{results['left_out'][0]}</li>" in (tmp_path / "short" / "report.html").read_text()
    (tmp_path / "short" / "samples" / "vanilla-1-8-1-seed0.jsonl").unlink()
    refused(evaluate("score", "--out", tmp_path / "short"), "has no complete run to score")
    off = dms_with(inputs, tmp_path / "off_model", dms_disable_eviction=True)
    refused(off.run(tmp_path / "off", runs=DMS), "off_model: its eviction is switched off")
    assert not (tmp_path / "off").exists()


def test_tokenizers_that_differ(inputs: Inputs, tmp_path: Path) -> None:
    """Catches: DMS and vanilla given different prompts, or the same ids that mean other words."""
    for name, file in (("template", "chat_template.jinja"), ("ids", "tokenizer.json")):
        folder = shutil.copytree(inputs.dms, tmp_path / f"{name}_model")
        text = (folder / file).read_text()
        if name == "ids":  # of two words that no prompt has
            vocabulary = json.loads(text)["model"]["vocab"]
            first, second = [word for word in vocabulary if word not in inputs.data.read_text()][-2:]
            for word, other in ((first, second), (second, first)):
                assert text.count(f'"{word}": {vocabulary[word]}') == 1
                text = text.replace(f'"{word}": {vocabulary[word]}', f'"{word}": {vocabulary[other]}')
        else:
            assert "assistant" in text
            text = text.replace("assistant", "user")
        (folder / file).write_text(text)
        done = inputs._replace(dms=folder).run(tmp_path / "out", runs=DMS)
        refused(done, f"the tokenizers of {inputs.model} and {folder} differ")
        assert not (tmp_path / "out").exists()


REFUSED = {
    "no budget": (["--budgets", "2-8"], "budget '2-8' is not W-L-CR"),
    "no method": (["--methods", "dms,"], "method '' is unknown"),
    "twice": (["--seeds", "1,2,1"], "seed 1 is named twice"),
    "seed": (["--seeds", "-1"], "-1 is no whole number from 0"),
    "nothing to run": (["--methods", "vanilla"], "budget 2-8-4 has nothing to run: it needs a method other"),
    "no checkpoint": (["--budgets", "1-8-1,2-8-8"], "budget 2-8-8 needs a checkpoint: --dms 8=DIR"),
    "checkpoint for nothing": (["--dms", "8=x"], "--dms 8=DIR has no effect: no budget has this CR"),
    "checkpoint twice": (["--dms", "4.0=x"], "--dms is given twice for the same name"),
    "checkpoint without CR": (["--dms", "x"], "x is not CR=DIR"),
    "model for nothing": (["--methods", "dms", "--budgets", "2-8-4"], "--model has no effect: only dms runs"),
    "greedy": (["--temperature", "0"], "--temperature 0 takes the likeliest token"),
    "top-p of greedy": (["--temperature", "0", "--top-p", "0.5"], "--top-p has no effect at --temperature 0"),
    "temperature": (["--temperature", "-1"], "-1 is no number from 0 on"),
    "top-p": (["--top-p", "1.5"], "1.5 is above 1"),
    "task": (["--task", "math"], "invalid choice: 'math'"),
    "no data": (["--data", "no.jsonl"], "no.jsonl, expected a JSONL file"),
    "task option": (["--task-option", "colour=red"], "found option colour, expected none"),
    "task option twice": (["--task-option", "a=1", "--task-option", "a=2"], "--task-option is given twice"),
    "type of a task option": (
        ["--task", "ruler_vt", "--task-option", "hops=-x"],
        "option hops '-x', expected a whole number",
    ),
    "negative task option": (["--task", "ruler_vt", "--task-option", "hops=-1"], "hops -1"),
    "no model": (["--model", "no_model"], "no_model is not a checkpoint: its config.json: No such file"),
    "no DMS model": ([], "base is not an exported DMS checkpoint"),
    "device": (["--device", "tpu"], "--device is tpu, torch sees cpu"),
    "triton": (["--page-attention", "triton"], "--page-attention triton needs a CUDA device"),
    "too long": (["--budgets", "1-8-1,2-4000-4"], "the model has "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, inputs: Inputs, tmp_path: Path) -> None:
    """Catches: a traceback, an option that is ignored, a folder left behind by a typing error."""
    options, message = REFUSED[case]
    out = tmp_path / "out"
    if case == "no DMS model":
        inputs = inputs._replace(dms=BASE)
    refused(inputs.run(out, *options, runs=DMS), message)
    assert case == "too long" or not out.exists()


def test_a_tokenizer_of_a_later_call(inputs: Inputs, tmp_path: Path) -> None:
    """Catches: prompts that differ between calls, where each call's own checkpoints agree."""
    out, folder = tmp_path / "out", shutil.copytree(inputs.model, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("assistant", "user"))
    other = inputs._replace(model=folder)
    assert other.run(out, runs=["--methods", "vanilla", "--budgets", "1-8-1"]).status == 0
    arguments = ["--task", "tiny_reasoner", "--data", inputs.data, "--batch-size", 2, "--device", "cpu"]
    arguments += ["--methods", "dms", "--budgets", "2-8-4", "--dms", f"4={inputs.dms}", "--out", out]
    refused(evaluate("run", *arguments), "holds an evaluation with prompts '3, sha256 ")


def test_dtypes_that_differ(inputs: Inputs, tmp_path: Path) -> None:
    """Catches: two dtypes in one table, under "auto" or in a later call."""
    other = dms_with(inputs, tmp_path / "other_model", dtype="bfloat16")
    message = f"the config.json of {inputs.model} names float32, that of {other.dms} bfloat16"
    refused(other.run(tmp_path / "out", runs=DMS), message)
    assert not (tmp_path / "out").exists()
    vanilla = ["--methods", "vanilla", "--budgets", "1-8-1"]
    assert inputs.run(tmp_path / "out", runs=vanilla).status == 0
    arguments = ["--task", "tiny_reasoner", "--data", inputs.data, "--batch-size", 2, "--device", "cpu"]
    arguments += ["--methods", "dms", "--budgets", "2-8-4", "--dms", f"4={other.dms}"]
    message = "with dtype 'float32', now it is 'bfloat16'"
    refused(evaluate("run", *arguments, "--out", tmp_path / "out"), message)


def test_damaged_settings(inputs: Inputs, tmp_path: Path) -> None:
    """Catches: a traceback for a file that somebody has edited."""
    settings = {"task": "tiny_reasoner", "data": str(inputs.data), "limit": None, "task_options": {}}
    for name, value, message in (
        ("task_options", [], "task_options is [], expected dict"),
        ("task_options", {"a": 1}, "task tiny_reasoner: found option a, expected none"),
        ("data", 3, "data is 3, expected str"),
        ("limit", "3", "limit is '3', expected int"),
        ("task", "ruler_vt", "names no checkpoint"),
        ("task", ["x"], "task is ['x'], expected str"),
    ):
        (tmp_path / "settings.json").write_text(json.dumps(settings | {name: value}))
        refused(evaluate("score", "--out", tmp_path), message)
    del settings["limit"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    refused(evaluate("score", "--out", tmp_path), "settings.json lacks 'limit'")


def test_folders_that_are_no_evaluation(inputs: Inputs, tmp_path: Path) -> None:
    """Catches: somebody's folder filled with samples, an empty evaluation left by `score`."""
    (tmp_path / "mine").write_text("kept")
    refused(inputs.run(tmp_path, runs=DMS), "is not empty and holds no evaluation: choose another --out")
    refused(inputs.run(tmp_path / "mine", runs=DMS), "mine")
    refused(
        evaluate("score", "--out", tmp_path),
        "holds no evaluation: its settings.json: No such file",
    )
    refused(evaluate("score", "--out", tmp_path / "none"), "holds no evaluation")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_call_that_failed_binds_nobody(inputs: Inputs, tmp_path: Path) -> None:
    """Catches: another --out asked for after a typing error."""
    runs = ["--methods", "vanilla", "--budgets", "1-8-1"]
    out, broken = tmp_path / "out", shutil.copytree(inputs.model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    refused(inputs._replace(model=broken).run(out, runs=runs), "cannot be read")
    assert inputs.run(out, "--temperature", "0", runs=runs).status == 0
