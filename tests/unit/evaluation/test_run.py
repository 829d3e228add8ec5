"""`evaluate run` and `score`: interrupted or not, with or without models, the table is the same."""

import json
import shutil
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_dms.evaluation import runner
from megatron_dms.provenance import made_by
from tests.support.evaluation_runs import PROBLEMS, Inputs, evaluate, make_inputs, refused, samples
from tests.support.tools import ROOT, run_python

FILES = [
    f"{name}-seed{seed}.jsonl"
    for name in ("vanilla-1-12-1", "vanilla-2-12-1", "tova-2-12-4", "dms-2-12-4")
    for seed in (0, 7)
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an evaluation that nothing interrupted; no test changes it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done = inputs.run(out)
    assert done.status == 0, done.errors
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def results(out: Path) -> dict:
    """Return the results without the seconds that a clock measured."""
    found = json.loads((out / "results.json").read_text())
    for row in found["rows"]:
        assert row.pop("seconds") > 0
    del found["mean_gain"]["seconds"]
    return found


@pytest.mark.slow
def test_table_files_and_report(inputs: Inputs, finished: Path) -> None:
    """Catches: chains of another problem, seeds or batches that draw alike, prompts in the text, a method
    that runs as another one, results that differ from the samples."""
    found, kept = results(finished)["rows"], samples(finished)
    assert [f"{row['method']}-{row['budget']}" for row in found] == [
        *("dms-2-12-4", "vanilla-1-12-1", "vanilla-2-12-1", "tova-2-12-4"),
    ]
    assert sorted(kept) == sorted(FILES) and not list(finished.glob("**/*partial*"))
    by_name = {f"{row['method']}-{row['budget']}": row for row in found}
    for name, lines in kept.items():
        assert [line["id"] for line in lines] == [f"heldout-3-{i}" for i in range(PROBLEMS)]
        assert [line["batch"]["index"] for line in lines] == [0, 0, 1]
        assert [line["batch"]["problems"] for line in lines] == [2, 2, 1]
        assert {len(line["chains"]) for line in lines} == {int(name.split("-")[1])}
    for name, row in by_name.items():
        lines = kept[f"{name}-seed0.jsonl"] + kept[f"{name}-seed7.jsonl"]
        for figure, of_chain in (("kv_reads", "kv_reads"), ("generated_tokens", "tokens")):
            total = sum(chain[of_chain] for line in lines for chain in line["chains"])
            assert row[figure] == pytest.approx(total / len(lines)), (name, figure)
    dense = by_name["vanilla-2-12-1"]
    assert dense["achieved_cr"] == 1 and dense["kv_reads"] == dense["dense_kv_reads"]
    assert by_name["dms-2-12-4"]["achieved_cr"] > 1.5 < by_name["tova-2-12-4"]["achieved_cr"]
    texts = {name: [chain["text"] for line in kept[name] for chain in line["chains"]] for name in FILES}
    assert texts["dms-2-12-4-seed0.jsonl"] != texts["dms-2-12-4-seed7.jsonl"]
    assert len(set(texts["dms-2-12-4-seed0.jsonl"])) == 2 * PROBLEMS
    asked = [json.loads(line)["messages"][1]["content"] for line in inputs.data.read_text().splitlines()]
    for place, text in enumerate(texts["vanilla-2-12-1-seed0.jsonl"]):
        assert text.startswith(asked[place // 2][:4])  # the trained model's first step repeats a line
    single = [json.loads(line) for line in (finished / "problems.jsonl").read_text().splitlines()]
    assert len(single) == len(found) * PROBLEMS
    for name, row in by_name.items():
        of_row = [problem for problem in single if f"{problem['method']}-{problem['budget']}" == name]
        assert row["accuracy"]["mean"] == pytest.approx(sum(p["accuracy"] for p in of_row) / PROBLEMS)
        assert all(len(p["answers"]) == row["seeds"] for p in of_row)
    everything = json.loads((finished / "results.json").read_text())
    assert everything["scored_by"] == made_by() and everything["left_out"] == []
    compared = [(row["method"], row["budget"]) for row in everything["difference_to_vanilla"]]
    assert compared == [("dms", "2-12-4"), ("tova", "2-12-4")]
    settings = json.loads((finished / "settings.json").read_text())
    assert settings["made_by"] == [made_by()] and settings["dtype"] == "float32"
    report = (finished / "report.html").read_text()
    assert '"scored_by"' in unescape(report)
    assert made_by()["commit"] in report and str(inputs.data) in report and report.count("<svg") == 3


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0, 1, 13])
def test_interrupted_and_resumed(inputs: Inputs, finished: Path, tmp_path: Path, monkeypatch, calls) -> None:
    """The run is stopped before the first batch, in the middle of a run, and among the last; half a line
    is left. Catches: a random state that goes on from batch to batch, a batch that is generated twice or
    never."""
    out, generate, made = tmp_path / "out", runner.answer_prompts, []

    def until(*arguments):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(1)
        return generate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "answer_prompts", until)
        done = inputs.run(out)
    assert (done.status, done.errors[-1]) == (130, "interrupted; the samples so far are kept")
    assert done.out == "" and not (out / "results.json").exists()
    if calls:
        latest = max((out / "samples").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        latest.write_bytes(latest.read_bytes() + b'{"id": "heldout-3-')
    monkeypatch.setattr(
        runner, "answer_prompts", lambda *arguments: (made.append(1), generate(*arguments))[1]
    )
    done = inputs.run(out)
    assert done.status == 0 and len(made) == 2 * len(FILES)
    assert samples(out) == samples(finished) and results(out) == results(finished)
    made.clear()
    assert inputs.run(out).status == 0 and not made, "a complete evaluation needs no model"


@pytest.mark.slow
def test_methods_and_seeds_may_be_added(inputs: Inputs, finished: Path, tmp_path: Path) -> None:
    """Catches: samples that depend on what else is asked for; --dms in a later call refused as a change."""
    out = tmp_path / "out"
    runs = ["--methods", "vanilla", "--budgets", "2-12-1", "--seeds", "7"]
    assert inputs.run(out, runs=runs).status == 0
    assert inputs.run(out).status == 0 and results(out) == results(finished)


@pytest.mark.slow
def test_rescoring_needs_no_models(inputs: Inputs, copy: Path, monkeypatch) -> None:
    """Scores in another folder and without the models. Catches: a path that only holds in the first
    folder, a table, report or sample that grading again changes."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (copy / "report.html").unlink()
    monkeypatch.chdir(copy.parent)
    hidden = inputs.folder.parent / "hidden"
    hidden.mkdir()
    try:
        for folder in (inputs.model, inputs.dms):
            folder.rename(hidden / folder.name)
        done = evaluate("score", "--out", copy)
    finally:
        for folder in hidden.iterdir():
            folder.rename(inputs.folder / folder.name)
        hidden.rmdir()
    assert done.status == 0 and done.errors == [], done.errors
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    *table, _, last = done.out.splitlines()
    rows = json.loads(last)["rows"]
    assert rows == json.loads((copy / "results.json").read_text())["rows"]
    assert [line.split()[:2] for line in table[2:]] == [[row["method"], row["budget"]] for row in rows]


@pytest.mark.slow
def test_score_names_what_is_left_out(inputs: Inputs, copy: Path) -> None:
    """Catches: a mean over the problems that happen to be there, seeds dropped without a word."""
    file = copy / "samples" / FILES[-1]
    cut = b"".join(file.read_bytes().splitlines(keepends=True)[:2])
    file.write_bytes(cut + b'{"id"')
    done = evaluate("score", "--out", copy)
    assert done.status == 0 and done.errors == ["left out: dms-2-12-4-seed7, 2 of 3 problems"]
    assert [row["seeds"] for row in results(copy)["rows"]] == [1, 2, 2, 2]
    assert file.read_bytes() == cut + b'{"id"', "a run may be writing to it"
    for other in set((copy / "samples").iterdir()) - {file}:
        other.unlink()
    refused(evaluate("score", "--out", copy), "has no complete run to score")


@pytest.mark.slow
def test_other_problems_under_the_same_name(inputs: Inputs, copy: Path, tmp_path: Path) -> None:
    """Catches: answers to other questions graded, or continued, because the file's name and ids are equal."""
    before = inputs.data.read_text()
    try:
        inputs.data.write_text(before.replace("what is", "and what is"))
        refused(
            evaluate("score", "--out", copy),
            "the problems of tiny_reasoner are not those of the samples",
        )
        refused(inputs.run(copy), "holds an evaluation with problems '3, sha256 ")
    finally:
        inputs.data.write_text(before)


@pytest.mark.slow
def test_other_settings_are_refused(inputs: Inputs, copy: Path, tmp_path: Path) -> None:
    """Catches: samples of two temperatures, models or batch sizes in one table."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for options, message in (
        (["--temperature", "0.7"], "with temperature 0.6, now it is 0.7: choose another --out"),
        (["--top-p", "1"], "with top_p 0.95, now it is 1.0"),
        (["--batch-size", "1"], "with batch_size 2, now it is 1"),
        (["--limit", "2"], "with problems '3, sha256 "),
        (["--dtype", "bfloat16"], "with dtype 'float32', now it is 'bfloat16'"),
    ):
        refused(inputs.run(copy, *options), message)
    other = shutil.copytree(inputs.dms, tmp_path / "other_model")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    refused(inputs._replace(dms=other).run(copy), "holds an evaluation with dms 4 [")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_moved_data_and_model(inputs: Inputs, copy: Path, tmp_path: Path) -> None:
    """Catches: answers that cannot be graded, and samples that cannot be added to, since a folder moved; a
    limit that changes nothing refused; data named to `score` for good."""
    moved = inputs._replace(data=shutil.copy(inputs.data, tmp_path / "moved.jsonl"))
    before = (copy / "settings.json").read_bytes()
    done = evaluate("score", "--out", copy, "--data", moved.data)
    assert done.status == 0 and str(moved.data) in (copy / "report.html").read_text(), done.errors
    assert (copy / "settings.json").read_bytes() == before
    other = tmp_path / "other.jsonl"
    other.write_text(inputs.data.read_text().replace("what is", "and what is"))
    refused(
        evaluate("score", "--out", copy, "--data", other),
        "the problems of tiny_reasoner are not those",
    )
    moved = moved._replace(dms=shutil.copytree(inputs.dms, tmp_path / "moved_model"))
    done = moved.run(copy, "--limit", PROBLEMS)
    assert done.status == 0, done.errors
    settings = json.loads((copy / "settings.json").read_text())
    assert (settings["data"], settings["limit"]) == (str(moved.data), PROBLEMS)
    assert settings["dms 4"][0] == str(moved.dms)


@pytest.mark.slow
def test_makers(inputs: Inputs, finished: Path, tmp_path: Path, monkeypatch) -> None:
    """Catches: the first call's commit under a later call's samples, a maker of nothing."""
    out, short = tmp_path / "out", ["--methods", "vanilla", "--budgets", "1-4-1", "--seeds"]
    for commit, seeds in (("one", "0"), ("two", "0"), ("three", "0,1")):
        monkeypatch.setattr(runner, "made_by", lambda device, commit=commit: {"commit": commit})
        done = inputs.run(out, runs=[*short, seeds])
        assert done.status == 0, done.errors
    makers = json.loads((out / "settings.json").read_text())["made_by"]
    assert makers == [{"commit": "one"}, {"commit": "three"}]


def test_loops() -> None:
    """Catches: a word said twice taken for a loop, a loop of a long block missed, a text that has ended."""
    text = list(range(100))
    for tail, expected in (
        ([7] * 32, True),
        ([7] * 31, False),
        ([1, 2, 3] * 11, True),
        (list(range(20)) * 4, True),
        (list(range(20)) * 3 + list(range(19)), False),
        ([7] * 40 + [8], False),
    ):
        assert runner.loops([200, *text, 300, *tail]) is expected, tail
    assert runner.loops([]) is False and runner.loops([1] * 32) is True


def test_a_model_without_an_end_of_text() -> None:
    """Catches: a pad id, or None, taken for the end."""

    class Model:
        class generation_config:
            eos_token_id = None

        class dms_settings:
            lag = 1

        class last_kv_stats:
            generated_tokens, tokens_seen, kv_reads, dense_kv_reads, peak_tokens = (
                [2, 1],
                [4, 1],
                [1.0, 1.0],
                [1, 1],
                [1.0, 1.0],
            )
            evicted_fraction, peak_bytes, dense_bytes = 0.0, 0, 0

    class Decoder:
        decode = staticmethod(lambda ids, skip_special_tokens, clean_up_tokenization_spaces: f"{ids}")

    chains = runner._chains([[5, 0], [6, 0]], Model, Decoder)
    assert [(chain.text, chain.ended) for chain in chains] == [("[5, 0]", False), ("[6]", False)]
    assert runner._batch(0, 1, 1.0, Model).decided == 3


def test_kept_answers_keep_their_spaces() -> None:
    """Catches: a tokenizer that cleans up spaces when it decodes, as Llama 3's do, in answers that are
    kept."""
    pieces = Tokenizer(models.WordLevel({"print('a": 0, " ,": 1, " b": 2, " .": 3, " !')": 4}))
    pieces.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, clean_up_tokenization_spaces=True)
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    stats = SimpleNamespace(generated_tokens=[5], kv_reads=[1.0], dense_kv_reads=[1], peak_tokens=[1.0])
    model = SimpleNamespace(last_kv_stats=stats, generation_config=SimpleNamespace(eos_token_id=9))
    (chain,) = runner._chains([[0, 1, 2, 3, 4]], model, tokenizer)
    assert chain.text == "print('a , b . !')"


def test_help_needs_no_torch() -> None:
    """Catches: seconds until a line of help, and help that needs a machine with torch."""
    for command in ("run", "score"):
        code = (
            "import runpy, sys\n"
            f"sys.argv = [{str(ROOT / 'tools' / 'evaluate.py')!r}, {command!r}, '--help']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as stop:\n    assert stop.code == 0\n"
            "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
        )
        done = run_python("-c", code)
        assert done.status == 0 and done.out.splitlines()[-1] == "[]", done.out + done.error
        assert "--out OUT" in done.out


def test_prompts_are_asked_in_the_batches_own_seed() -> None:
    """The seed is the same for all methods, and another for each seed and batch. Catches: seed 1 of one
    batch that is seed 0 of the next, as with sums."""
    batches = [[runner.Prompted(name, [1])] for name in ("p0", "p1")]
    seeds = {runner._seed(seed, batch) for seed in (0, 1) for batch in batches}
    assert len(seeds) == 4
    for seed in seeds:
        torch.manual_seed(seed)
