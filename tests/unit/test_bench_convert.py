"""tools/bench.py convert, on a checkpoint of a few megabytes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from megatron_dms.checkpoint import benchmark

TOOL = Path(__file__).parents[2] / "tools" / "bench.py"


def test_the_benchmark_measures_both_directions_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Catches: memory above what is promised, a synthetic model that cannot be converted, a checkpoint
    smaller than asked for, a folder left behind, chatter on stdout after the JSON line.
    """
    spec = importlib.util.spec_from_file_location("bench", TOOL)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(benchmark, "HIDDEN", 256)
    monkeypatch.setattr(benchmark, "_SHARD_BYTES", 5 * 10**6)
    command = ["bench.py", "convert", "--gigabytes", "0.02", "--folder", str(tmp_path), "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", command)
    assert bench.main() == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert 0.02e9 <= found["bytes"] < 0.03e9 and "1 of 1: export" in err
    assert set(found) == {"bytes", "cp", "import", "export"}
    for step in ("import", "export"):
        row = found[step]
        assert row["seconds"] > 0 and row["ratio_to_cp"] == row["seconds"] / found["cp"]["seconds"]
        # 100 MB more than the promise's 500 for Python and torch: that part is torch's own
        assert 10**8 < row["peak_bytes"] < row["allowed_bytes"] + 10**8
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", [*command[:-4], "--folder", str(tmp_path / "none")])
    assert bench.main() == 2
    assert capsys.readouterr().err.count("error: ") == 1
