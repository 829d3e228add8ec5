"""`verify-resume` on a run of one small process, which keeps its promise or breaks it in one way."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.tools import ROOT, Done, run_tool

pytestmark = pytest.mark.slow

# A launcher and its one rank: a number is added up, and every step is a checkpoint.
RUN = """
import argparse, os, shutil, subprocess, sys, time
if "RANK" not in os.environ:
    sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | {"RANK": "0"}).returncode != 0)
from argparse import Namespace
from pathlib import Path
import torch
from megatron_dms.resilience import run_folder
from megatron_dms.formats.checksums import digest, file_names
from megatron_dms.formats.torch_dist import Chunk, Reader, write
parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="none")
for flag in ("--save", "--load", "--tensorboard-dir"):
    parser.add_argument(flag, type=Path)
for flag in ("--train-iters", "--save-interval"):
    parser.add_argument(flag, type=int)
args = parser.parse_args()
if args.fault == "fails":
    sys.exit(3)
start, _ = run_folder.resume_point(args.load)
value = torch.zeros(3)
if start and args.fault != "starts anew":
    value = Reader(args.load / run_folder.iteration_name(start)).tensor("w")
    print(f" resuming from iteration {start} of it", flush=True)
elif start:
    start = 0
    print(" resuming from iteration 0 of it", flush=True)
if start and args.fault == "differs":
    value[0] += 1e-6
for step in range((start or 0) + 1, args.train_iters + 1):
    value += 1 / step
    folder = run_folder.new_staging(args.save, clean=True) / run_folder.iteration_name(step)
    folder.mkdir()
    write(folder, [Chunk("w", (3,), torch.float32, lambda: [value])], [], {"args": Namespace()})
    time.sleep(0.1)
    run_folder.finish(folder, args.save, step, {name: digest(folder / name) for name in file_names(folder)})
    if args.fault == "loses" and step > 1:
        shutil.rmtree(args.save / run_folder.iteration_name(step - 1))
    time.sleep(0.1)
"""


def verify(tmp_path: Path, *words: str, fault: str = "none") -> Done:
    """Run the tool on the small run."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = (sys.executable, script, "--fault", fault)
    return run_tool("verify-resume", *words, "--", *command, env={"PYTHONPATH": str(ROOT)})


def flags(tmp_path: Path) -> list[str]:
    words = f"--out {tmp_path / 'out'} --steps 5 --save-interval 1 --kills 2 --while-saving 1 --seed 2"
    return [*words.split(), "--timeout", "100"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", "1 of 1 tensors are equal in every bit"),
        ("differs", "0 of 1 tensors are equal in every bit; w differs"),
        ("starts anew", "error: resumed from iteration 0, the newest was "),
        ("loses", ": lost [1"),
        ("fails", "error: the run failed by itself with status 1; "),
    ],
)
def test_a_broken_promise_is_seen(tmp_path: Path, fault: str, message: str) -> None:
    """Catches: a tool that finds every run good: kills that never happen, a run that starts anew each time,
    checkpoints that go, and a last bit that nobody looks at."""
    done = verify(tmp_path, *flags(tmp_path), fault=fault)
    assert message in done.error, done.error
    found = json.loads(done.out.splitlines()[-1])
    assert done.status == (0 if fault == "none" else 1) and found["equal"] == (fault == "none")
    if fault in ("none", "differs"):
        assert found["kills"] == 2 and found["resumes"] >= 1 and found["leftovers"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0 --save-interval 1", "--steps: 0 is no whole number above 0"),
        ("--steps 2 --save-interval 1 --while-saving 2", "--while-saving: 2 is above 1"),
        ("--steps 2 --save-interval 3", "--save-interval is 3, more than --steps 2"),
        ("--step 2", "unrecognized arguments: --step 2"),
    ],
)
def test_bad_input(tmp_path: Path, words: str, message: str) -> None:
    """Catches: a mistake that is found after the first long run, or in a traceback."""
    done = verify(tmp_path, "--out", str(tmp_path / "out"), *words.split())
    assert done.status == 2 and not (tmp_path / "out").exists()
    (line,) = (line for line in done.errors if line.startswith("error: "))
    assert message in line or "the following arguments are required" in line
