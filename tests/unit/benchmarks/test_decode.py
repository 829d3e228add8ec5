"""`bench decode` on a tiny shape: these figures are arithmetic, so no test depends on timing."""

import json

import pytest
import torch

from megatron_dms.benchmarks.decode import WINDOW, measure
from tests.support.tools import run_tool


@pytest.mark.parametrize(("cr", "batch"), [(8.0, 1), (2.0, 2), (1.0, 1)])
def test_caches_hold_what_the_ratio_says(cr: float, batch: int) -> None:
    """Catches: a DMS cache filled to another ratio, bytes counted for one sequence or one layer, a ratio of
    bytes upside down."""
    (row,) = measure("tiny", [4096], batch, cr, 1, torch.float32, lambda line: None)
    pair = 2 * 16 * 4
    assert row.dense_bytes == 2 * batch * 2 * 4096 * pair  # layers, sequences, KV heads, tokens
    assert row.live_bytes / row.dense_bytes == pytest.approx(1 / cr, rel=0.05)
    assert row.live_bytes <= row.allocated_bytes < 1.25 * row.live_bytes
    assert row.allowed_speedup == pytest.approx(
        (row.weight_bytes + row.dense_bytes) / (row.weight_bytes + row.live_bytes)
    )
    assert min(row.dense_step, row.dms_step, row.dense_attention, row.dms_attention) > 0


def test_command_line() -> None:
    """Catches: a table without its JSON line; a traceback for a number out of range."""
    command = ("bench", "decode", "--shape", "tiny", "--steps", 1)
    done = run_tool(*command, "--contexts", 512)
    assert done.status == 0, done.error
    (row,) = json.loads(done.out.splitlines()[-1])["rows"]
    assert row["context"] == 512
    done = run_tool(*command, "--cr", 0.5)
    assert done.status == 2 and done.out == ""
    assert done.error.startswith("error: ") and done.error.count("\n") == 1, done.error


@pytest.mark.parametrize(
    ("shape", "contexts", "batch", "cr", "steps"),
    [
        ("huge", [512], 1, 8.0, 1),
        ("tiny", [512, WINDOW], 1, 8.0, 1),
        ("tiny", [512], 0, 8.0, 1),
        ("tiny", [512], 1, 0.5, 1),
        ("tiny", [512], 1, 8.0, 0),
    ],
)
def test_numbers_out_of_range(shape: str, contexts: list[int], batch: int, cr: float, steps: int) -> None:
    """Catches: an error that comes after minutes of work, or none."""
    with pytest.raises(ValueError, match="expected"):
        measure(shape, contexts, batch, cr, steps, torch.float32, lambda line: None)
