"""The preflight: two nodes on this machine over gloo, one of them wrong; and each check alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_dms.launch import node_checks
from megatron_dms.launch.node_report import CHECKS, Finding, NodeReport, compare, failures, table
from tests.support.tools import ROOT, run_tool

HOSTS = "localhost,127.0.0.1"
FIRST, SECOND = "node 0 (localhost)", "node 1 (127.0.0.1)"


@pytest.fixture
def training(originals: Path, tmp_path: Path) -> list[str]:
    """Return training flags that every check accepts at two processes."""
    write_data(tmp_path / "data")
    base, data, run = originals / "megatron", tmp_path / "data", tmp_path / "run"
    files = f"--pretrained-checkpoint {base} --dms-teacher {base} --train-data-path {data} --save {run}"
    return f"{files} --micro-batch-size 1 --global-batch-size 4".split()


def write_data(prefix: Path) -> None:
    """Write two documents and their loss masks."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, dtype in ((f"{prefix}", np.uint16), (f"{prefix}_loss_mask", np.uint8)):
        builder = IndexedDatasetBuilder(f"{name}.bin", dtype=dtype)
        for length in (3, 5):
            builder.add_document(torch.ones(length, dtype=torch.int64), [length])
        builder.finalize(f"{name}.idx")


def start_node(rank: int, port: int, training: list[str], timeout: int = 60) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "tools" / "preflight.py"),
        "--hosts",
        HOSTS,
        "--node-rank",
        str(rank),
    ]
    command += ["--gpus-per-node", "1", "--device", "cpu", "--port", str(port), "--min-free-gb", "0.001"]
    command += ["--timeout", str(timeout), "--", *training]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_one_wrong_node_of_two(training: list[str], tmp_path: Path) -> None:
    """The second node's teacher is not there; the all-reduce works. Catches: a node whose failures are
    lost or put down to another, an exit status of 0, a node that does not learn of it, and an all-reduce
    of one node."""
    wrong = [*training]
    wrong[training.index("--dms-teacher") + 1] = str(tmp_path / "nowhere")
    port = free_port()
    other = start_node(1, port, wrong)
    first = start_node(0, port, training)
    out, errors = first.communicate(timeout=200)
    assert other.wait(timeout=60) == 1 and first.returncode == 1, errors
    *lines, last = out.splitlines()
    result = json.loads(last)
    assert result["passed"] is False and result["failures"] == errors.splitlines()
    (line,) = result["failures"]
    assert line.startswith(f"{SECOND}: checkpoint: found teacher: {tmp_path}/nowhere does not exist")
    wrong_cells = [
        (node, check) for node, cells in result["nodes"].items() for check in CHECKS if cells[check] is False
    ]
    assert wrong_cells == [(SECOND, "checkpoint")]
    assert result["nodes"][FIRST]["all-reduce"] is result["nodes"][SECOND]["all-reduce"] is True
    assert lines[0].split() == ["node", *CHECKS] and lines[3].startswith(SECOND) and "FAIL" in lines[3]
    assert len(lines) == 4


@pytest.mark.slow
def test_a_silent_node_is_named(training: list[str]) -> None:
    """Catches: a first node that waits for ever, or an all-reduce that is begun and hangs."""
    out, errors = start_node(0, free_port(), training, timeout=3).communicate(timeout=100)
    cells = json.loads(out.splitlines()[-1])["nodes"]
    assert cells[FIRST]["all-reduce"] is None and cells[FIRST]["checkpoint"] is True
    assert f"{SECOND}: port: found no word from it within 3 s" in errors


@pytest.mark.slow
def test_a_taken_port_is_named(training: list[str]) -> None:
    """Catches: a first node that cannot listen and says so in a traceback."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start_node(0, port, training, timeout=5)
        errors = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and len(errors.splitlines()) == 1
    assert f"{FIRST}: port: found port {port} cannot be opened" in errors and "fix: set PORT" in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "found run, expected -- before"),
        (["--nodes", "2"], "unrecognized arguments: --nodes"),
        (["--node-rank", "2"], "--node-rank is 2, expected 0 to 1"),
        (
            ["--", "--tensor-model-parallel-size", "two"],
            "training flags: argument --tensor-model-parallel-size",
        ),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str) -> None:
    done = run_tool("preflight", "--hosts", "a,b", "--gpus-per-node", 1, *words)
    assert done.status == 2 and len(done.errors) == 1 and said in done.error


@pytest.mark.parametrize(
    ("words", "world", "found", "expected"),
    [
        ("--tensor-model-parallel-size 4", 6, "6 processes", "a multiple of TP 4 x PP 1 x CP 1 = 4"),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2", 12,
         "12 processes", "a multiple of TP 2 x PP 2 x CP 2 = 8"),
        ("--micro-batch-size 2 --global-batch-size 9", 2, "--global-batch-size 9",
         "micro batch 2 x data parallel 2"),
        ("--pipeline-model-parallel-size 0", 4, "4 processes", "a multiple of TP 1 x PP 0"),
    ],
)  # fmt: skip
def test_layout(words: str, world: int, found: str, expected: str) -> None:
    """Catches: a size that is left out of the product, and a batch that no data parallel size divides."""
    flags = node_checks.training_flags(words.split())
    finding = node_checks.check_processes(flags, world)[-1]
    assert finding.passed is False and found in finding.found and expected in finding.expected and finding.fix
    sizes = "--tensor-model-parallel-size 2 --context-parallel-size 3"
    good = node_checks.training_flags([*sizes.split(), "--micro-batch-size", "2", "--global-batch-size", "8"])
    assert [finding.passed for finding in node_checks.check_processes(good, 12)] == [True]


def test_disk(tmp_path: Path) -> None:
    """Catches: the free space of another folder, and a folder that is made or written into by the check."""
    save = tmp_path / "not" / "there"
    assert node_checks.check_disk(str(save), 1e-3).passed is True
    full = node_checks.check_disk(str(save), 1e9)
    assert full.passed is False and f"free at {tmp_path}" in full.found and full.expected == "1e+09 GB"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert node_checks.check_disk(str(tmp_path / "file"), 0).passed is False
    assert "--save" in node_checks.check_disk(None, 0).found


def test_data_is_read_not_only_listed(tmp_path: Path) -> None:
    """Catches: a missing companion, and a file that is there but shorter."""
    write_data(tmp_path / "data")
    flags = node_checks.training_flags(["--train-data-path", str(tmp_path / "data")])
    findings, facts = node_checks.check_data(flags)
    assert [finding.passed for finding in findings] == [True] and len(facts) == 1
    (tmp_path / "data_loss_mask.bin").write_bytes(b"")
    assert "data_loss_mask.bin" in node_checks.check_data(flags)[0][0].found
    (tmp_path / "data.idx").unlink()
    assert "data.idx" in node_checks.check_data(flags)[0][0].found
    assert node_checks.check_data(node_checks.training_flags([]))[0][0].passed is False


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: more or fewer devices than processes taken for enough."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert node_checks.check_gpus("cuda", 7).passed is True
    finding = node_checks.check_gpus("cuda", 8)
    assert finding.passed is False and finding.found == "7 GPUs" and finding.expected == "8"


def test_the_odd_node_out_is_the_one_that_differs() -> None:
    """One of three nodes differs, wherever it stands. Catches: all nodes blamed, or the first taken for
    right."""
    for odd in range(3):
        reports = [
            NodeReport(f"n{rank}", [], {"versions": {"torch": "2.6" if rank == odd else "2.13"}})
            for rank in range(3)
        ]
        compare(reports)
        assert [report.passed("versions") for report in reports] == [rank != odd for rank in range(3)]
        (line,) = failures(reports)
        expected = f"expected torch 2.13, as on n{int(odd == 0)};"
        assert line.startswith(f"n{odd}: versions: found torch 2.6; {expected}")


def test_versions_name_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches: an edited file that no commit shows."""
    before = node_checks.versions("cpu")["megatron_dms"]
    assert before.startswith("commit ") and before == node_checks.versions("cpu")["megatron_dms"]
    (tmp_path / "megatron_dms").mkdir()
    (tmp_path / "pretrain_dms.py").write_text("# edited")
    monkeypatch.setattr(node_checks, "ROOT", tmp_path)
    after = node_checks.versions("cpu")["megatron_dms"]
    assert after.split("source ")[1] != before.split("source ")[1] and "commit unknown" in after


def test_table_marks_what_was_not_run() -> None:
    report = NodeReport("n", [Finding("port", True), Finding("disk", True), Finding("disk", False)])
    cells = table([report]).splitlines()[2].split()
    assert cells == ["n", "ok", "-", "FAIL", *"-" * (len(CHECKS) - 3)]
