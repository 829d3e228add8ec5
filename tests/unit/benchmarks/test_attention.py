"""`bench attention` on tiny shapes: the drawn decisions, the arithmetic of the rows, the command line."""

from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension  # warns at import where there is a toolkit but no GPU

from megatron_dms.benchmarks import attention as benchmark
from megatron_dms.benchmarks.attention import AttentionResult, Shape, drawn, measure, of_checkpoint
from tests.support.benchmark_output import rows_of
from tests.support.dms_by_definition import reference
from tests.support.exported_models import export_with_tokenizer
from tests.support.tools import run_tool

CPU = torch.device("cpu")
SHAPE = Shape(B=1, H=4, G=2, D=16, window=8)
T = 96


@pytest.mark.parametrize("cr", [1, 4, 8, 96])
def test_drawn_decisions_have_the_ratio(cr: float) -> None:
    """Catches: the evicted share in place of the kept one, a share that is only expected, one draw for all
    heads, keys kept at the beginning only."""
    decisions = drawn(cr, SHAPE, T, CPU)
    (log_keep,) = decisions.layers
    kept = log_keep > -1
    assert (kept.sum(dim=-1) == T / cr).all() and decisions.cr == pytest.approx(cr)
    assert (log_keep[~kept] < -90).all() and (log_keep[kept] <= 0).all()
    if cr == 4:
        assert not torch.equal(kept[0, 0], kept[0, 1]) and kept[..., T // 2 :].any()


def of(rows: list[AttentionResult], attention: str, step: str, cr: float | None) -> AttentionResult:
    (row,) = (x for x in rows if x.attention.startswith(attention) and x.step == step and x.cr == cr)
    return row


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a row of another candidate's times, ratios upside down or with other decisions, the backward's
    products in the forward's rate, a mean over layers forgotten or taken twice."""
    two_layers = benchmark.Decisions("of two layers", 2 * drawn(2, SHAPE, T, CPU).layers)
    decisions = {T: [drawn(1, SHAPE, T, CPU), drawn(4, SHAPE, T, CPU), two_layers]}
    seconds = {}
    compare = benchmark.compare

    def keeping(*args: object) -> dict:
        found = compare(*args)
        seconds.update(found)
        return found

    monkeypatch.setattr(benchmark, "compare", keeping)
    rows = measure(SHAPE, decisions, ["dense", "flash"], torch.float32, 2, CPU, lambda line: None)
    assert [row.attention for row in rows[1:7]] == ["dense", "flash"] * 3 and len(rows) == 14
    products = 2 * 4 * 16 * T**2
    for step, factor in (("forward", 1.0), ("forward + backward", 3.5)):
        causal = of(rows, "causal (", step, None)
        assert causal.to_causal == 1 and causal.to_flex is None and causal.cr is None
        for name in ("dense", "flash"):
            for cr in (1.0, 4.0, 2.0):
                row = of(rows, name, step, cr)
                assert row.to_causal == pytest.approx(row.ms / causal.ms)
                assert row.tflops == pytest.approx(factor * products / (row.ms / 1e3) / 1e12)
                assert row.low_ms <= row.ms <= row.high_ms and row.to_flex is None
        row = of(rows, "dense", step, 1.0)
        assert 4 * T * T * 4 < row.peak_bytes  # a score matrix of each head, at least
        assert causal.peak_bytes < of(rows, "flash", step, 4.0).peak_bytes
    # `seconds` is of the last call: forward + backward, of both layers
    assert row.ms == pytest.approx(seconds["dense", "drawn at CR 1"].ms)
    assert of(rows, "dense", step, 2.0).ms == pytest.approx(seconds["dense", "of two layers"].ms / 2)


def test_gradients_are_asked_for_in_the_second_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a forward that keeps what only a backward needs, a backward without decisions' gradient."""
    wanted = []

    def attend(q, k, v, log_keep, window):
        wanted.append([x.requires_grad for x in (q, k, v, log_keep)])
        return q * k.mean() * v.mean() * log_keep.mean()

    monkeypatch.setattr(benchmark, "attention_backend", lambda name: attend)
    measure(SHAPE, {T: [drawn(4, SHAPE, T, CPU)]}, ["dense"], torch.float32, 1, CPU, lambda line: None)
    assert wanted == [[False] * 4] * 3 + [[True] * 4] * 3


@pytest.mark.slow
def test_command_line() -> None:
    """Catches: a table that does not say what was not measured, JSON with another figure in its place, flex's
    ratio of other decisions."""
    sizes = ("--contexts", 64, T, "--heads", 4, "--head-size", 16, "--cr", 1, 3, "--repeats", 1)
    done = run_tool("bench", "attention", *sizes, "--backends", "dense", "flex")
    assert done.status == 0, done.error
    out, err = done.out, done.error
    rows = rows_of(out, columns=10)
    assert len(rows) == 2 * 2 * (1 + 2 * 2) and {row["T"] for row in rows} == {64, T}
    for row, line in zip(rows, out.splitlines()[2:], strict=False):
        lacking = [
            row[name] is None for name in ("ms", "ms", "tflops", "to_causal", "peak_bytes")
        ]  # quartiles
        lacking.append(row["to_flex"] is None and row["cr"] is not None)
        assert line.count("not measured") == sum(lacking)
    assert f"forward, context {T}" in err
    flex = [row for row in rows if row["attention"] == "flex"]
    for row in flex:
        assert (row["ms"] is None) == (row["step"] != "forward") and row["note"]
    for row in rows:
        if row["attention"] == "dense" and row["step"] == "forward":
            (same,) = (x for x in flex if (x["T"], x["cr"], x["step"]) == (row["T"], row["cr"], row["step"]))
            assert row["to_flex"] == pytest.approx(row["ms"] / same["ms"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_with_tokenizer(tmp_path_factory.mktemp("decisions") / "tiny_retrofit", lag=2, window=5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("k = 0 ; l = 3 ; what is l ? " * 3)
    return file


def test_decisions_of_a_retrofit(
    checkpoint: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: decisions of another layer or chunk, not shifted or the wrong way, soft ones; a window other
    than the checkpoint's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(benchmark, "CHUNK", 7)
    shape, found = of_checkpoint(checkpoint, text, [9, 30], CPU)
    assert shape == Shape(B=1, H=4, G=2, D=16, window=5)
    ids = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)(text.read_text())["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    for T, decisions in found.items():
        carried = reference(model, torch.tensor(ids[:T])).decision  # [L, G, T]
        evict = torch.zeros_like(carried)
        evict[..., :-2] = carried[..., 2:]
        assert torch.equal(torch.cat(decisions.layers) == -torch.inf, evict)
        assert torch.cat(decisions.layers)[~evict].eq(0).all()
        assert decisions.cr == pytest.approx(1 / (1 - evict.double().mean().item()))
    options = ("attention", "--decisions", checkpoint, "--text", text, "--repeats", 1, "--backends", "flash")
    done = run_tool("bench", *options, "--contexts", 30)
    assert done.status == 0, done.error
    rows = rows_of(done.out, columns=10)
    assert {row["window"] for row in rows} == {5} and len(rows) == 4
    done = run_tool("bench", *options, "--contexts", 9, 3000)
    assert done.status == 2, done.error
    out, err = done.out, done.error
    assert not out and err.splitlines()[-1].endswith(
        f"text.txt has {len(ids)} tokens, but a context of 3000 is asked for"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attention", "--backends", "fast"], "back-ends are ['fast']"),
        (["attention", "--cr", "0.5"], "argument --cr: 0.5 is below 1"),
        (["attention", "--groups", "3"], "a multiple of KV heads"),
        (["attention", "--repeats", "0"], "--repeats: 0 is no whole number above 0"),
        (["attention", "--contexts", "0"], "--contexts: 0 is no whole number above 0"),
        (["attention", "--dtype", "float64"], "--dtype is float64"),
        (["attention", "--text", "a"], "--decisions and --text go together"),
        (["attention", "--text", "a", "--decisions", "b", "--cr", "2"], "--cr with --decisions"),
        (["attention", "--text", "a", "--decisions", "b"], "b is not a checkpoint"),
        (["attention", "--window", "x"], "--window"),
        (["loss", "--tokens", "0"], "--tokens: 0 is no whole number above 0"),
        (["loss", "--steps", "1"], "steps 0 or > 2"),
        (["loss", "--dtype", "float16"], "--dtype is float16"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    """Catches: an option that is measured as "not measured" in place of refused, a traceback."""
    done = run_tool("bench", *options)
    assert done.status == 2, done.error
    out, err = done.out, done.error
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
