"""Run the whole demo, shortened: import, retrofit at TP 2 x PP 2, two exports, generation, comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds; it takes about 60 on two idle cores


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the demo in a process of its own, as a user does -> its folder."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "examples/tiny_reasoner/demo.py", "--short", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_summary_shows_a_smaller_cache(out: Path) -> None:
    """Catches an export that evicts nothing, a step that is exported under the wrong ratio, and a meter that
    counts the dense cache. After a few steps accuracy means nothing, but the cache must shrink."""
    summary = json.loads((out / "summary.json").read_text())
    rows = [summary[name] for name in ("teacher", "cr4", "cr8")]
    assert all(set(row) >= {"accuracy", "achieved_cr", "kv_reads", "peak_tokens"} for row in rows)
    teacher, cr4, cr8 = rows
    assert teacher["achieved_cr"] == 1.0 and teacher["accuracy"] >= 0.9
    assert cr8["achieved_cr"] > cr4["achieved_cr"] > 1.5
    for name in ("kv_reads", "peak_tokens"):
        assert cr8[name] < teacher[name] and cr4[name] < teacher[name], name
    assert summary["wall_seconds"] > 0


def test_exports_say_what_they_are(out: Path) -> None:
    """Catches settings that training used and that the export has lost."""
    for ratio in (4, 8):
        config = json.loads((out / f"cr{ratio}" / "config.json").read_text())
        assert config["dms_cr"] == ratio
        assert config["dms_window_size"] == 16 and config["dms_separate_alpha"] is False


def test_pictures_and_log_are_there(out: Path) -> None:
    """Catches a validation that draws nothing, and a log without the schedule."""
    pictures = [
        out / "accuracy_vs_kv_reads.png",
        *(out / "tensorboard" / "pictures").glob("kept_fraction_*.png"),
    ]
    assert len(pictures) >= 2
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "CR 4 at step 16" in (out / "retrofit.log").read_text()
