"""Planning: predictions against measurements.

The figures are those of the documents; one set of constants is used for all.
"""

import json
import re
from dataclasses import replace

import pytest

from megatron_dms.planning import calibration
from megatron_dms.planning.calibration import Compared, fitted_slowdown, geometric_mean
from megatron_dms.planning.devices import DEVICES, Assumptions
from megatron_dms.planning.job import RECIPES, Job
from megatron_dms.planning.models import preset
from megatron_dms.planning.search import find_layouts
from tests.support.tools import ROOT, run_tool


def rows_after(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    below = text[text.index(heading) :]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_figures_are_those_of_the_documents() -> None:
    """Catches: a measurement that was repeated since, or mistyped."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    found, shape, batch, cr = [], "", "", ""
    for cells in rows_after(page, "## Decoding"):
        shape, batch, cr = cells[0] or shape, cells[1] or batch, cells[2] or cr
        found.append((shape, int(batch), int(cr), int(cells[3]), *map(float, cells[4:6]), float(cells[-1])))
    assert found == [tuple(row) for row in calibration.DECODES]
    served = {
        int(cells[0]): tuple(int(part) for part in cells[3].split(","))
        for cells in rows_after(page, "## Serving")
    }
    assert served == calibration.SERVED
    first_run = (ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")
    for row in calibration.DEMO:
        (line,) = re.findall(rf"^{row.name} .*$", first_run, re.MULTILINE)
        assert [float(word) for word in line.split()[-3:]] == list(row[1:])


def test_shapes_are_those_of_the_benchmarks() -> None:
    """Catches: a wrong vocabulary, hidden or feed-forward size, number of layers or heads, or head size."""
    from megatron_dms.benchmarks.synthetic_models import SHAPES, WINDOW

    assert WINDOW == calibration.DECODE_WINDOW
    for size in (calibration.TOY, calibration.QWEN3_SMALL, calibration._SHAPES["Llama 3.2 1B"]):
        assert SHAPES[size.name] == size
    known = {
        "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64),
        "qwen3-0.6b": (151936, 1024, 3072, 28, 16, 8, 128),
        "tiny": (131, 64, 96, 2, 4, 2, 16),
    }
    assert {
        name: (s.vocab, s.hidden, s.ffn, s.layers, s.heads, s.groups, s.head_size)
        for name, s in SHAPES.items()
    } == known


def test_published_runs_are_those_of_the_authors() -> None:
    """Catches: a run tuned by its batch, its steps or its recipe."""
    one, large, adapter = calibration.TRAININGS
    assert (one.device_hours, one.context, one.batch, one.steps) == (10, 4096, 1024, 100)
    assert (large.device_hours, large.context, large.batch, large.steps) == (345, 8192, 1024, 100)
    assert (adapter.device_hours, adapter.context, adapter.batch) == (8 * 4, 32768, 8)
    assert (adapter.steps, adapter.ranks, adapter.recipe) == (544, 8, "adapter")


def test_one_slowdown_for_all() -> None:
    """The slowdown is what the runs give, and no other constant depends on them. Catches: a default that
    was not fitted anew after the model of time had changed."""
    assumed = Assumptions()
    found = calibration.trainings(assumed)
    assert fitted_slowdown(found) == pytest.approx(assumed.slowdown, rel=0.005)
    ratios = [row.run.device_hours / row.roofline.predicted for row in found]
    assert geometric_mean(ratios) == pytest.approx((ratios[0] * ratios[1] * ratios[2]) ** (1 / 3))
    for row, own in zip(found, ratios, strict=True):
        assert row.expected.predicted == pytest.approx(row.roofline.predicted * assumed.slowdown)
        (one, other) = [ratio for ratio in ratios if ratio != own]
        assert row.left_out.predicted == pytest.approx(row.roofline.predicted * (one * other) ** 0.5)
        assert row.plan.layout.ranks == row.run.ranks
    other = calibration.trainings(replace(assumed, slowdown=1.0))
    assert [row.roofline for row in other] == [row.expected for row in other]
    assert [row.roofline for row in other] == [row.roofline for row in found]


def test_errors_by_hand() -> None:
    assert Compared("x", "s", 10, 8).error == pytest.approx(-20)
    assert Compared("x", "s", 8, 10).error == pytest.approx(25)
    # a toy of 2 layers, 2 KV heads of 16 in fp32: 512 bytes a token, and a quarter of it twice
    found = {row.name: row.predicted for row in calibration.largest_batches()}
    weights = 4 * (131 * 64 + 64 + 2 * (64 * (64 + 64) * 1 + 64 * 64 + 3 * 64 * 96 + 128))
    assert weights == 4 * calibration.TOY.parameters()
    assert found["toy, context 4096, dense"] == (1e9 - weights) // (4096 * 512 * 1.25)
    assert found["toy, context 4096, CR 8"] == (1e9 - weights) // ((512 + 32) * 512 * 1.25)
    assert found["toy, context 1024, CR 8"] == (1e9 - weights) // ((257 + 32) * 512 * 1.25)
    bandwidth, caches, steps = calibration.decoding()
    assert caches[0].predicted == pytest.approx((512 + 32) / 4096)
    assert steps[0].error == pytest.approx(0)  # that row gives the bandwidth
    pairs = 16 * 8 * 2 * 64 * 4
    assert steps[1].predicted == pytest.approx(1e3 * (4 * 1_235_814_400 + 512 * pairs) / bandwidth)
    demo = {(row.name, row.unit): row.predicted for row in calibration.demo()}
    assert demo["demo, cr4", "peak pairs"] == pytest.approx(17 + (250.8 - 17) / 4.10)
    # a teacher of texts that end at 250.8 tokens reads 26727 pairs if prompts have 97.2
    start = (250.8**2 - 2 * 26727) ** 0.5
    assert start == pytest.approx(97.2, abs=0.05)
    by_steps = sum(17 + (start + (i + 0.5) / 100 * (250.8 - start) - 17) / 4.10 for i in range(100)) / 100
    assert demo["demo, cr4", "pairs read"] == pytest.approx((250.8 - start) * by_steps)


def test_check_prints_every_error() -> None:
    """Catches: a row that is left out, an error that is not printed."""
    done = run_tool("plan", "check")
    assert done.status == 0, done.error
    found = json.loads(done.out.splitlines()[-1])
    assert len(found["compared"]) == 15 + 12 + 4 + 30
    for row in found["compared"]:
        (line,) = [line for line in done.out.splitlines() if line.startswith(row["name"] + " ")
                   and f" {row['unit']} " in line]  # fmt: skip
        assert line.endswith(f"{row['error_percent']:+.1f} %")
        assert row["error_percent"] == pytest.approx(100 * (row["predicted"] / row["measured"] - 1))
    for row in found["training"]:
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"{row['name']}  ")]
        for kind in ("roofline", "expected", "left_out"):
            assert f"{row[kind]['error_percent']:+.0f} %" in line
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for row in found["training"]:  # the document's errors are today's
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row['name']} |")]
        for kind in ("roofline", "expected", "left_out"):
            assert f"| {row[kind]['predicted']:.1f} | {row[kind]['error_percent']:+.0f} % |" in line


def test_the_documents_examples_are_todays() -> None:
    """Catches: a formula that has changed since docs/planning.md was written."""
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    name, found = "", 0
    for cells in rows_after(page, "The authors' models"):
        name = cells[0] or name
        title, recipe = name.split(", ")
        model = preset(title.lower().replace(" ", "-"))
        job = Job(model, RECIPES[recipe], model.context, model.batch)
        ranks = int(cells[1])
        best = find_layouts(job, ranks, DEVICES["h100"], Assumptions()).plans[0]
        assert cells[3:5] == [f"{best.memory.total / 1e9:.0f}", f"{best.seconds:.1f}"], name
        for cell, steps in zip(cells[5:], (300, 700), strict=True):
            assert cell == f"{best.hours(steps):.0f} ({best.device_hours(steps):.0f})", name
        found += 1
    assert found == 8
