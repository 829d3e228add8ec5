"""`bench convert` on a checkpoint of a few megabytes."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_dms.benchmarks import convert as benchmark
from tests.support.tools import ROOT, Done, run_tool


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmark make a model a hundredth as large."""
    monkeypatch.setattr(benchmark, "HIDDEN", 256)
    monkeypatch.setattr(benchmark, "_SHARD_BYTES", 5 * 10**6)


def run(folder: Path, *options: str) -> Done:
    """Run the benchmark in `folder`; later options win."""
    return run_tool("bench", "convert", "--gigabytes", 0.02, "--repeats", 1, "--folder", folder, *options)


@pytest.mark.slow
def test_the_benchmark_measures_both_directions_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: memory above what is promised, a synthetic model that cannot be converted, a checkpoint
    smaller than asked for, a folder left behind, chatter on stdout after the JSON line, more room taken on
    the disk than is asked for.
    """
    sizes = []

    def disk_use(*_: object) -> None:
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))

    monkeypatch.setattr(os, "sync", disk_use)
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: (disk_use(), rmtree(*args, **options)))
    done = run(tmp_path)
    assert done.status == 0, done.error
    found = json.loads(done.out.splitlines()[-1])
    assert 0.02e9 <= found["bytes"] < 0.03e9 and "1 of 1: export" in done.error
    assert 2.9 < max(sizes) / found["bytes"] < benchmark._COPIES + 0.1
    assert set(found) == {"bytes", "cp to import", "import", "cp to export", "export"}
    for step in ("import", "export"):
        row = found[step]
        assert row["seconds"] > 0 and row["ratio_to_cp"] == row["seconds"] / found[f"cp to {step}"]["seconds"]
        # 100 MB more than the promise's 500 for Python and torch: that part is torch's own
        assert 10**8 < row["peak_bytes"] < row["allowed_bytes"] + 10**8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gigabytes", "x"), "--gigabytes: x is no number above 0"),
        (("--gigabytes", "inf"), "--gigabytes: inf is no number above 0"),
        (("--gigabytes", "nan"), "--gigabytes: nan is no number above 0"),
        (("--gigabytes", "0"), "--gigabytes: 0 is no number above 0"),
        (("--gigabytes=-4",), "--gigabytes: -4 is no number above 0"),
        (("--gigabytes", "1e300"), "needs 3e+300 GB"),  # or its layers would be counted until memory ends
        (("--repeats", "0"), "--repeats: 0 is no whole number above 0"),
        (("--repeats=-1",), "--repeats: -1 is no whole number above 0"),
        (("--repeats", "1.5"), "--repeats: 1.5 is no whole number above 0"),
        (("--folder", "/nowhere/at/all"), "--folder /nowhere/at/all is no folder"),
        (("--folder", str(ROOT / "tools" / "bench.py")), "bench.py is no folder"),
        (("--rounds", "3"), "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line_before_any_work(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: a traceback (ceil of inf, median of nothing), usage lines of argparse, minutes of work before
    the refusal.
    """
    monkeypatch.setattr(benchmark, "synthetic", lambda *_: pytest.fail("work was begun"))
    done = run(tmp_path, *options)
    assert done.status == 2
    assert done.out == "" and done.error.startswith("error: ") and len(done.errors) == 1
    assert message in done.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["little room", "writing", "cp", "import"])
def test_a_step_that_fails_is_one_line_and_leaves_nothing(
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: CalledProcessError as a traceback, the words of cp or convert.py lost or on a line of their
    own after which only a status is told, a full disk that leaves gigabytes.
    """
    full = os.strerror(errno.ENOSPC)
    fake = tmp_path / "bin" / "cp"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho 'cp: error writing it: {full}' >&2\nexit 1\n")
    fake.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, full)

    if step == "little room":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(0.05e9)))
    elif step == "writing":
        monkeypatch.setattr(benchmark, "write_file", fail)
    elif step == "cp":
        monkeypatch.setenv("PATH", str(fake.parent))
    else:
        monkeypatch.setattr(benchmark, "_CHILD", f"raise SystemExit('note: x\\nerror: disk full: {full}')")
    done = run(work)
    assert done.status == 2
    last = done.errors[-1]
    expected = {
        "little room": f"error: disk full: {work} needs 0.06 GB, 0.05 GB are free; make room",
        "writing": f"error: the benchmark in {work} failed: {full}",
        "cp": f"error: cp ended with status 1: cp: error writing it: {full}",
        "import": f"error: import ended with status 1: disk full: {full}",
    }
    assert last.startswith(expected[step])
    assert not list(work.iterdir())
