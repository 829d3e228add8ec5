"""`bench serve` on a tiny shape: bytes against counting by hand, and the search for the largest batch."""

import json
from pathlib import Path

import pytest
import torch

from megatron_dms.benchmarks import serve as benchmark
from megatron_dms.benchmarks.measuring import Measured
from megatron_dms.benchmarks.serve import (
    ALLOCATION,
    DecodeResult,
    LargestResult,
    Serving,
    account,
    measure,
    search,
)
from megatron_dms.benchmarks.synthetic_models import SHAPES, WINDOW, make_models
from tests.support.tools import run_tool

CPU = torch.device("cpu")
LAYERS, G, D, FP32 = 2, 2, 16, 4
PAGE = 64
T = 1024
GOOD = {
    **{"shape": "tiny", "contexts": [T], "batches": [1], "crs": [8.0], "memory_gb": 0.05, "max_batch": 3},
    **{"repeats": 2, "dtype": torch.float32, "device": CPU, "say": lambda line: None},
}


def measured(**other: object) -> tuple[list[DecodeResult], list[LargestResult]]:
    return measure(**GOOD | other)


@pytest.mark.parametrize("batch", [1, 2])
def test_bytes_are_those_counted_by_hand(batch: int) -> None:
    """Catches: sequences that share pages, a layer left out, bookkeeping or empty slots overlooked, the
    fill's tensors counted, a peak without the second copy of a layer's keys that the dense cache needs."""
    models = make_models("tiny", 8.0, torch.float32, CPU)
    dense, dms = (Serving(models, cr, T, batch) for cr in (None, 1.0))
    with torch.no_grad():
        dense.start()
        dms.start()
    keys = batch * G * (T + 2) * D * FP32  # of a layer, after two steps
    assert dense.cache_bytes == LAYERS * 2 * keys
    assert 0.95 * keys < dense.peak_bytes - dense.cache_bytes < 1.2 * keys
    # The heads' pages are full after T tokens, so each opens one more, for which there is room.
    full = batch * G * T // PAGE
    spare = max(2, full // 16) if batch > 1 else batch * G
    pages = LAYERS * 2 * (full + spare) * PAGE * D * FP32
    of_page, of_head, of_pool = (full + spare) * (8 + 4), batch * G * (8 + 8 + (WINDOW + 1) * (4 + 1)), 8
    of_batch = sum(part.nbytes for part in (dms.cache.seen_B, *dms.cache.meter.state))
    assert dms.cache_bytes == pages + LAYERS * (of_page + of_head + of_pool) + of_batch
    assert [int(layer.held_BG.sum()) for layer in dms.cache.layers] == [batch * G * (T + 2)] * LAYERS
    addresses = {layer.pool.keys_PSD.data_ptr() for layer in dms.cache.layers}
    assert len(addresses) == LAYERS and dms.peak_bytes > dms.cache_bytes


@pytest.mark.slow
def test_rows() -> None:
    """Catches: rows in another order, a ratio to another context's or upside down, weights left out of the
    budget or counted for each model, bytes of another batch, throughput of one sequence or beyond the cap."""
    steps, largest = measured(contexts=[512, 4096], batches=[2, 1], memory_gb=0.03)
    expected = [(T, B, cr) for T in (512, 4096) for B in (1, 2) for cr in (None, 8.0)]
    assert [(row.context, row.batch, row.cr) for row in steps] == expected
    for i, row in enumerate(steps):
        assert row.measured == "decode step" and row.note is None and row.ms > 0
        assert row.to_dense == pytest.approx(row.ms / steps[i // 2 * 2].ms)
        assert row.page_attention == (None if row.cr is None else "torch")
        assert 0 < row.cache_bytes < row.peak_bytes
    shape = SHAPES["tiny"]
    H, F, heads = shape.hidden, shape.ffn, shape.heads * D
    of_layer = 2 * H * heads + 2 * H * G * D + 3 * H * F + 2 * H
    weights = FP32 * (shape.vocab * H + LAYERS * of_layer + H)  # input and output share one embedding
    assert [(row.context, row.cr) for row in largest] == [(T, cr) for T in (512, 4096) for cr in (None, 8.0)]
    for i, row in enumerate(largest):
        (of_two,) = (x for x in steps if (x.context, x.cr, x.batch) == (row.context, row.cr, 2))
        assert row.weight_bytes == weights and row.memory_bytes == 30_000_000 and row.bytes_batch == 2
        assert row.sequence_bytes == of_two.peak_bytes / 2
        assert row.largest_batch == row.accounted_batch == int((3e7 - weights) / (of_two.peak_bytes / 2))
        assert row.found_by == "account of measured bytes"
        assert (row.batch, row.capped, row.note) == (3, True, None)
        assert row.tokens_per_second == pytest.approx(3 / row.ms * 1e3)
        dense = largest[i // 2 * 2]
        assert row.largest_to_dense == row.largest_batch / dense.largest_batch
        assert row.throughput_to_dense == pytest.approx(dense.ms / row.ms)
    assert 5 < largest[3].largest_to_dense < 8.5 and largest[1].largest_to_dense < 2.1
    # Of 4098 dense tokens, 2.1 MB and a quarter of it again while the keys of a layer are copied.
    assert largest[2].largest_batch == 11


def test_account() -> None:
    """Catches: rounding up, weights forgotten, a negative batch."""
    assert [account(1000, 100, 90), account(999, 100, 90), account(100, 100, 90)] == [10, 9, 0]
    assert account(50, 100, 90) == 0 and account(1000, 0, 0.5) == 2000


@pytest.mark.parametrize("truth", [0, 1, 2, 15, 16, 100, 1000])
@pytest.mark.parametrize("guess", [0, 1, 15, 17, 100, 1100])
def test_search_finds_the_largest_that_fits(truth: int, guess: int) -> None:
    """Catches: off by one, an endless loop, a guess that is believed, far too many attempts, a batch tried
    twice, or of 0."""
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        assert len(tried) < 40
        return n <= truth

    assert search(fits, guess) == truth
    assert len(set(tried)) == len(tried) and min(tried) > 0
    if abs(truth - guess) * 16 <= guess:
        assert len(tried) <= 10


@pytest.mark.slow
def test_what_the_account_says_is_tried_where_memory_can_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: the account taken for the truth on a GPU, throughput of a batch that does not fit."""
    steps, _ = measured()
    models = make_models("tiny", 8.0, torch.float32, CPU)
    setting = benchmark.Setting("tiny", torch.float32, torch.device("cuda"), models, 10**7, None, 2)

    def attempt(serving: Serving, repeats: int) -> Measured:
        return Measured(2.0, 1.0, 3.0) if serving.batch <= 5 else Measured(note="out of memory")

    monkeypatch.setattr(Serving, "attempt", attempt)
    monkeypatch.setattr(benchmark, "device_name", str)
    monkeypatch.setattr(benchmark, "_limited_to", lambda *_: torch.no_grad())
    row = benchmark._largest(setting, steps[:1], None)
    assert (row.accounted_batch, row.largest_batch, row.found_by) == (14, 5, ALLOCATION)
    assert (row.batch, row.capped, row.tokens_per_second, row.note) == (5, False, 2500.0, None)


@pytest.mark.slow
def test_budget_too_small() -> None:
    """Catches: a speed of no sequences, a division by zero."""
    _, largest = measured(memory_gb=1e-4)
    for row in largest:
        assert (row.largest_batch, row.batch, row.capped, row.note) == (0, 0, False, "not one sequence fits")
        assert row.ms is row.tokens_per_second is row.largest_to_dense is row.throughput_to_dense is None


@pytest.mark.slow
def test_what_fails_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a run that ends with the first batch that memory does not hold, figures for it, bytes per
    sequence from it."""
    fill = benchmark.fill

    def short(caches: list, model: object, B: int, T: int, cr: float) -> None:
        if T == 512:
            raise torch.OutOfMemoryError("CUDA out of memory")
        fill(caches, model, B, T, cr)

    monkeypatch.setattr(benchmark, "fill", short)
    steps, largest = measured(contexts=[512, T])
    for row in (*steps[:2], *largest[:2]):
        assert row.ms is None and row.note == "out of memory"
    assert largest[0].largest_batch is largest[0].found_by is largest[0].sequence_bytes is None
    assert all(row.ms > 0 for row in (*steps[2:], *largest[2:]))


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    """Catches: rows without their JSON, chatter on stdout, no picture, options that do not arrive."""
    picture = tmp_path / "served.png"
    options = ("--contexts", 300, 512, "--batches", 1, 2, "--cr", 2, "--repeats", 2, "--max-batch", 1)
    done = run_tool("bench", "serve", *options, "--memory", 0.01, "--figure", picture)
    assert done.status == 0, done.error
    lines = done.out.splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines if line.startswith("{")]
    assert [row["measured"] for row in rows] == ["decode step"] * 8 + ["largest batch"] * 4
    assert len(lines) == 1 + (1 + 8) * 2 - 1 + (1 + 4) * 2 - 1
    assert {row["batch"] for row in rows[8:]} == {1} and {row["memory_bytes"] for row in rows[8:]} == {10**7}
    assert "(cap)" in done.out and picture.read_bytes().startswith(b"\x89PNG")
    done = run_tool("bench", "serve", "--memory", 0.01, "--figure", picture)
    assert done.status == 2 and done.out == "" and "exists" in done.error


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": "huge"},
        {"contexts": [T, WINDOW]},
        {"batches": [1, 0]},
        {"crs": [4.0, 0.5]},
        {"crs": [float("nan")]},
        {"crs": [float("inf")]},
        {"memory_gb": 0.0},
        {"memory_gb": float("nan")},
        {"max_batch": 0},
        {"repeats": 0},
    ],
    ids=str,
)
def test_numbers_out_of_range(wrong: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an error that comes after minutes of work, or none."""
    monkeypatch.delattr(benchmark, "make_models")
    with pytest.raises(ValueError, match="expected"):
        measured(**wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contexts", 512], "--memory"),
        (["--memory", "much"], "--memory"),
        (["--memory", 1, "--contexts", 100], "contexts > 256"),
        (["--memory", 1, "--speed", 1], "--speed"),
        (["--memory", 1, "--dtype", "float16"], "--dtype"),
        (["--memory", 1, "--figure", "out.text"], "--figure"),
        (["--memory", 1, "--figure", "no/such/folder.png"], "--figure"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(options: list[object], words: str) -> None:
    """Catches: a traceback, an unknown option dropped, a budget made up on the CPU."""
    done = run_tool("bench", "serve", *options)
    assert done.status == 2 and done.out == "", done.error
    assert done.error.startswith("error: ") and done.error.count("\n") == 1 and words in done.error
