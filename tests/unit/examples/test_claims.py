"""The experiments of the tiny reasoner: what is kept between calls, what is drawn, where pairs are kept."""

import dataclasses
import json
import os
from importlib import import_module as script  # the example's scripts import each other by bare names
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dms.evaluation.budgets import Budget, plan
from tests.support.dms_by_definition import reference
from tests.support.exported_models import export_with_tokenizer

SEEDS = (1, 2, 3)
METHODS_ASKED = ("vanilla", "dms", "tova", "h2o", "quest", "window")


def rows(shift: float) -> dict[str, dict[str, float]]:
    return {
        cr: {
            "accuracy": 0.5 + shift,
            "achieved_cr": float(cr) - shift,
            "kv_reads": 1000 / float(cr),
            "training_tokens": 4096,
        }
        for cr in ("2", "4", "6", "8")
    }


def trials(*names: str) -> dict[str, Any]:
    each = {name: [{"seed": seed, "crs": rows(0.01 * seed)} for seed in SEEDS] for name in names}
    return {"teacher": {"accuracy": 0.9}, "trials": each}


def kept(value: float) -> dict[str, Any]:
    return {"heads": [[value, 0.1]] * 3, "positions": [[value] * 20] * 6, "prompt": 7.5}


def method_rows(method: str, crs: tuple[int, ...]) -> list[dict[str, Any]]:
    cost = {"kv_reads": 5.0, "peak_tokens": 3.0, "accuracy": {"mean": 0.4, "low": 0.3, "high": 0.5}}
    return [{"method": method, "budget": f"{chains}-9-{cr}", **cost} for cr in crs for chains in (1, 2)]


RESULTS = {
    "delayed": trials("dms", "immediate"),
    "data": trials("steps-10", "dms", "dmc-10", "dmc-30"),
    "ablations": trials("dms", "lag-0", "window-4"),
    "long": trials("long-4", "long-8"),
    "where": {"seeds": {str(seed): {"4": kept(0.9), "8": kept(0.2)} for seed in SEEDS}},
    "methods": {
        "seeds": {
            str(seed): {"rows": [*method_rows("vanilla", (1,)), *method_rows("dms", (4, 8))]}
            for seed in SEEDS
        }
    },
}


@pytest.mark.parametrize("claim", RESULTS)
def test_every_claim_has_its_picture(claim: str, tmp_path: Path) -> None:
    """Catches a claim without a drawing, and results that its drawing does not read."""
    assert set(RESULTS) == set(script("claims").CLAIMS)
    script("claim_figures").draw(claim, RESULTS[claim], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_error_bars_are_standard_deviations_over_seeds() -> None:
    """Catches a standard error, and a deviation that divides by n."""
    assert script("claim_figures").over_seeds([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7.0**0.5))
    assert script("claim_figures").over_seeds([4.0]) == (4.0, 0.0)


def test_a_trial_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a second training of what is there; another step exported than the one at which the schedule
    asks for the CR; tokens that leave out the zeroing phase; a folder that takes results of other settings
    for its
    own."""
    module = script("trials")
    calls: list[Any] = []
    monkeypatch.setattr(module, "train", lambda *args: calls.append("train"))
    monkeypatch.setattr(module, "export", lambda run, step, folder: calls.append((step, folder.name)))
    monkeypatch.setattr(module, "_measure", lambda folder, merges, problems: {"accuracy": 0.25})
    first = module.run_trial("steps-10", 3, tmp_path, 20)
    assert calls == ["train", (90, "cr4"), (130, "cr8")]
    assert {cr: row["training_tokens"] for cr, row in first["crs"].items()} == {
        "4": 90 * 8 * 272,
        "8": 130 * 8 * 272,
    }
    calls.clear()
    assert module.run_trial("steps-10", 3, tmp_path, 20) == first and not calls
    with pytest.raises(ValueError, match=r"steps-10-seed3.settings\.json says other settings"):
        module.run_trial("steps-10", 3, tmp_path, 21)


def test_trials_differ_from_the_standard_in_what_they_are_named_after() -> None:
    """Catches a name that says something else than the command line gets."""
    trials_of = script("trials").TRIALS | script("trials").LONG_TRIALS
    standard = trials_of["dms"].retrofit
    said = {
        name: set(trial.retrofit.command_line()) - set(standard.command_line())
        for name, trial in trials_of.items()
    }
    assert said["dms"] == set()
    assert said["immediate"] == {"--dms-lag"}  # as long as the window, which stands there already
    assert trials_of["immediate"].retrofit.flags["--dms-lag"] == standard.window
    assert said["lag-0"] == {"--dms-lag"} and trials_of["lag-0"].retrofit.flags["--dms-lag"] == 0
    assert said["window-64"] == {"64"} and said["key-channel"] == {"--dms-predictor", "key_channel"}
    assert {"200", "400"} <= said["long-8"] and trials_of["long-4"].retrofit.steps == 200 + 3 * 400
    assert trials_of["long-8"].retrofit.batch == 16  # a number that the standard's window has, too
    assert {"--dms-method", "merge"} <= said["dmc-30"] and trials_of["dmc-30"].merges
    for name in ("steps-10", "steps-60", "dmc-10", "dmc-60"):
        assert trials_of[name].retrofit.steps_per_cr == int(name.split("-")[1])
    for trial in trials_of.values():  # every CR that is measured was saved
        every = int(dict(zip(*[iter(trial.retrofit.command_line())] * 2, strict=True))["--save-interval"])
        assert all(trial.retrofit.step_of(cr) % every == 0 for cr in trial.crs)


@pytest.mark.parametrize("lag", [0, 2])
def test_where_pairs_are_kept(lag: int, tmp_path: Path) -> None:
    """Compares with the reference's decisions, text by text. Catches: a decision counted for the token
    that carries it rather than for its pair, texts of other lengths averaged in, heads and layers
    exchanged."""
    folder = export_with_tokenizer(tmp_path / "model", lag=lag, window=5)
    problems = script("trials").heldout_set(3)
    found = script("where").kept_fractions(folder, problems)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = [tokenizer.apply_chat_template(p["messages"], return_dict=True)["input_ids"] for p in problems]
    assert len({len(ids) for ids in texts}) > 1
    kept = [~reference(model, torch.tensor(ids)).decision[..., lag:] for ids in texts]
    pairs = sum(k.shape[-1] for k in kept)
    heads = sum(k.sum(dim=-1) for k in kept) / pairs
    torch.testing.assert_close(torch.tensor(found["heads"], dtype=heads.dtype), heads)
    last = max(k.shape[-1] for k in kept) - 1
    there = [k[..., last] for k in kept if k.shape[-1] > last]
    expected = torch.stack(there).double().mean(dim=0).flatten()
    assert [row[last] for row in found["positions"]] == pytest.approx(expected.tolist(), abs=1e-4)
    prompts = [
        tokenizer.apply_chat_template(p["messages"][:-1], add_generation_prompt=True, return_dict=True)
        for p in problems
    ]
    assert found["prompt"] == pytest.approx(sum(len(p["input_ids"]) for p in prompts) / len(prompts))


def test_committed_results_are_of_todays_claims() -> None:
    """Catches a claim without results, results whose seeds or trials are others now, a picture that is
    missing."""
    folder = Path(script("claims").__file__).parent / "results"
    assert {path.stem for path in folder.glob("*.json")} == set(RESULTS)
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        assert path.with_suffix(".png").exists()
        assert f"claims.py {path.stem} --seeds" in result["command"] and result["made_by"]["commit"]
        assert len(result.get("seeds", SEEDS)) >= len(SEEDS)
        for name, seeds in result.get("trials", {}).items():
            assert len({seed["seed"] for seed in seeds}) >= len(SEEDS), name
            wanted = {str(cr) for cr in script("trials").trial_of(name).crs}
            assert all(set(seed["crs"]) == wanted for seed in seeds), name


def test_methods_asks_for_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the command line that the claim gives to `evaluate`, and the whole of `main` around it.
    Catches: models of another seed, a CR without its checkpoint, a method that runs nothing, results
    without command or commit."""
    claims, asked = script("claims"), []

    def evaluate(tool: Path, *arguments: object) -> str:
        words = [str(word) for word in arguments]
        asked.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps(RESULTS["methods"]["seeds"]["1"]))
        return "table\n{}\n"

    monkeypatch.setattr(claims, "python", evaluate)
    monkeypatch.setattr(claims, "run_trials", lambda *arguments: {})
    monkeypatch.setattr(claims, "problems_file", lambda work, count: work / f"{count}.jsonl")
    work, out = tmp_path / "work", tmp_path / "out"
    assert claims.main(["methods", "--seeds", "4", "6", "--work", str(work), "--out", str(out)]) == 0
    assert len(asked) == 2
    for seed, words in zip((4, 6), asked, strict=True):
        flags = dict(zip(words[1::2], words[2::2], strict=True))
        assert flags["--seeds"] == str(seed) and flags["--methods"] == ",".join(METHODS_ASKED)
        assert [word for word in words if word.endswith(("cr4", "cr8"))] == [
            f"{cr}={work}/dms-seed{seed}/cr{cr}" for cr in (4, 8)
        ]
        budgets = [Budget.parse(text) for text in flags["--budgets"].split(",")]
        assert plan(flags["--methods"].split(","), budgets, [seed])
    result = json.loads((out / "methods.json").read_text())
    assert set(result["seeds"]) == {"4", "6"} and "methods --seeds 4 6" in result["command"]
    assert (out / "methods.png").exists()


def test_methods_are_drawn_where_they_are() -> None:
    """Catches: the axes exchanged, shares for percent, points of another method."""
    figure = script("claim_figures").figure_of("methods", RESULTS["methods"])
    reads, peaks = figure.axes
    for axes, cost in ((reads, 5.0), (peaks, 3.0)):
        drawn = {tuple(map(float, container.lines[0].get_xydata()[0])) for container in axes.containers}
        assert drawn == {(cost, 40.0)}


def test_settings_are_plain(tmp_path: Path) -> None:
    """Catches a setting that JSON gives back as another one, which would refuse every second call."""
    for trial in (script("trials").TRIALS | script("trials").LONG_TRIALS).values():
        settings = dataclasses.asdict(trial.retrofit)
        assert json.loads(json.dumps(settings)) == settings
    assert os.path.isdir(script("trials").BASE)


def test_no_two_modules_have_one_name() -> None:
    """Scripts of the example and helpers of the tests are imported by their bare names, in one process.
    Catches: the one taken for the other, which shows only where both are collected."""
    examples = {path.name for path in Path(script("claims").__file__).parents[1].rglob("*.py")}
    tests = {path.name for path in Path(__file__).parents[2].rglob("*.py")}
    assert not examples & tests
