"""`bench loss` on tiny shapes: all candidates compute the same loss, and the rows' arithmetic is right."""

import pytest
import torch

from megatron_dms.benchmarks import loss as loss_benchmark
from megatron_dms.benchmarks.measuring import Measured
from tests.support.benchmark_output import rows_of
from tests.support.tools import run_tool

CPU = torch.device("cpu")
N, V, E = 24, 3000, 16
LOGITS = 4 * N * V


@pytest.mark.parametrize("group", [loss_benchmark._of_logits, loss_benchmark._with_projection])
def test_all_candidates_give_one_gradient(group) -> None:
    """Runs each candidate twice, as one of them overwrites its input. Catches: KL in the other direction,
    a candidate without one of the gradients, a teacher that is what the last candidate left of it."""
    torch.manual_seed(3)
    candidates, _ = group(N, V, E, torch.float32, CPU)
    found = []
    for _ in range(2):
        for candidate in candidates.values():
            candidate.prepare()
            found.append(candidate.run())
    assert len(found) == 6 and found[0][0].abs().max() > 1e-3
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=1e-4, atol=1e-6)


def test_command_line() -> None:
    """Catches: a ratio to another group's loss, percent of bytes in another type, gradients counted that are
    not to be, growth that is the peak."""
    options = ("--tokens", N, "--columns", V, "--hidden", E, "--repeats", 2, "--steps", 4)
    done = run_tool("bench", "loss", *options)
    assert done.status == 0, done.error
    rows = rows_of(done.out, columns=7)
    assert [row["loss"] for row in rows] == [
        *("modelopt", "plain formula", "distillation_kl"),
        *("linear + modelopt", "linear + distillation_kl", "linear_kl"),
    ]
    for i, row in enumerate(rows):
        assert row["to_modelopt"] == pytest.approx(row["ms"] / rows[i // 3 * 3]["ms"])
        own = 4 * E * (N + V) if row["hidden"] else 0
        assert row["peak_percent"] == pytest.approx(100 * (row["peak_bytes"] - own) / LOGITS)
        assert (row["steps"], row["growth_bytes"], row["peak_growth_bytes"]) == (4, 0, 0)
    assert rows[0]["peak_percent"] > 500 and rows[3]["peak_percent"] > 500  # several copies in fp32


def test_a_leak_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: growth that is always 0, or counted from the first step on."""
    kept = []
    leaking = loss_benchmark.Candidate(lambda: kept.append(torch.empty(250)))
    assert loss_benchmark._growth(leaking, 10, CPU) == (8000, 8000)
    assert loss_benchmark._percent(Measured(peak_bytes=300), 100, 400) == 50
