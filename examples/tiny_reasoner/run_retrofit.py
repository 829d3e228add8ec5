"""Run one retrofit of a tiny reasoner with pretrain_dms.py, from an HF folder to an exported ladder of CRs.

The demo uses this with four ranks, the claims for many retrofits with one rank each.
"""

import dataclasses
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# "iteration      12/     480 | ... | KL: 1.2E-02 | ... | achieved CR (hard): 1.0E+00 |" in Megatron's log
_LOGGED = re.compile(
    r"iteration\s+(\d+)/\s*(\d+) \|.*?KL: ([\d.E+-]+).*?target CR: ([\d.E+-]+)"
    r".*?achieved CR \(hard\): ([\d.E+-]+)"
)
_TAIL_LINES = 30


@dataclass(frozen=True)
class Retrofit:
    """Settings of one retrofit; all other settings are the same for all retrofits."""

    zeroing_steps: int = 60
    """Steps in which the borrowed channel fades out; 0 for the linear predictor."""
    steps_per_cr: int = 60
    """Steps per unit of compression ratio: CR 4 takes 3 times as many, CR 8 takes 7 times as many."""
    final_cr: int = 8
    window: int = 16
    """In tokens; the problems are about 250 tokens long."""
    batch: int = 16
    """Samples per step."""
    sequence: int = 288
    """In tokens; longer than any problem."""
    learning_rate: float = 8e-4
    """It falls linearly to a tenth."""
    seed: int = 1234
    """Seed of the data order and of the noise; the weights start from the base model."""
    flags: dict[str, str | int | float] = field(default_factory=dict)
    """Further flags of pretrain_dms.py."""

    def step_of(self, cr: int) -> int:
        """Return the training step whose checkpoint is the model at CR `cr`."""
        return self.zeroing_steps + (cr - 1) * self.steps_per_cr

    @property
    def steps(self) -> int:
        """All training steps."""
        return self.step_of(self.final_cr)

    def command_line(self) -> list[str]:
        """Return the flags of pretrain_dms.py, without folders, data and layout."""
        flags = {
            "--seq-length": self.sequence,
            "--micro-batch-size": self.batch // 2,
            "--global-batch-size": self.batch,
            "--train-iters": self.steps,
            # The checkpoint of every CR is at a multiple of this.
            "--save-interval": math.gcd(self.zeroing_steps, self.steps_per_cr),
            "--lr": self.learning_rate,
            "--min-lr": self.learning_rate / 10,
            "--lr-decay-style": "linear",
            "--lr-warmup-iters": max(self.zeroing_steps // 4, 1),
            "--adam-beta2": 0.95,
            "--weight-decay": 0,
            "--clip-grad": 1.0,
            "--eval-iters": 0,
            "--log-interval": 5,
            "--seed": self.seed,
            "--dms-window": self.window,
            "--dms-zeroing-steps": self.zeroing_steps,
            "--dms-steps-per-cr": self.steps_per_cr,
            "--dms-final-cr": self.final_cr,
            **self.flags,
        }
        return [str(word) for pair in flags.items() for word in pair]

    def having(self, flags: Mapping[str, str | int | float] | None = None, **changes: Any) -> "Retrofit":
        """Return these settings with some of them changed; `flags` are added to the present flags."""
        return dataclasses.replace(self, flags={**self.flags, **(flags or {})}, **changes)


def tokenize(
    base: Path, prefix: Path, split: str, count: int, seed: int, difficulty: Sequence[object] = ()
) -> None:
    """Write problems as Megatron's .bin/.idx.

    All tokens are targets: the base models were trained on all tokens, and the prompts keep the fading phase
    gentle.

    Args:
        difficulty: further flags of problems.py.
    """
    problems = prefix.with_suffix(".jsonl")
    flags = ("--split", split, "--count", count, "--seed", seed, "--out", problems, *difficulty)
    python(HERE / "problems.py", *flags)
    tokens = ("--tokenizer", base, "--output-prefix", prefix, "--loss-on", "all")
    python(ROOT / "tools/preprocess_data.py", "--input", problems, *tokens)


def train(
    retrofit: Retrofit,
    base: Path,
    data: Path,
    run: Path,
    log: Path,
    layout: dict[str, int] | None = None,
    more: dict[str, object] | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Train, or go on at the last checkpoint in `run`.

    Args:
        base: the imported Megatron checkpoint, both the start and the teacher.
        data: prefix of the .bin/.idx files.
        run: folder for checkpoints.
        log: everything that the run prints is appended to this file.
        layout: Megatron's flags of parallelism; None for one process.
        more: further flags.
        progress: gets a line of progress now and then.

    Raises:
        SystemExit: the run failed. The message is the end of the log.
    """
    layout = layout or {}
    ranks = math.prod(layout.values())
    flags = {
        "--pretrained-checkpoint": base,
        "--dms-teacher": base,
        "--load": run,
        "--save": run,
        "--train-data-path": data,
        **layout,
        **(more or {}),
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    command = [sys.executable, *launcher, str(ROOT / "pretrain_dms.py"), *retrofit.command_line()]
    command += [str(word) for pair in flags.items() for word in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as out, subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None, "stdout is a pipe"
        begin = time.monotonic()
        for line in process.stdout:
            out.write(line)
            if progress is not None and (logged := _LOGGED.search(line)):
                progress(_progress_text(logged, time.monotonic() - begin))
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-_TAIL_LINES:])
        raise SystemExit(f"{tail}\nthe retrofit failed with exit code {process.returncode}; see {log}")


def _progress_text(logged: re.Match[str], seconds: float) -> str:
    step, steps, kl, target, achieved = logged.groups()
    ratio = f"CR {float(achieved):.2f} (target {float(target):.2f})"
    left = seconds / int(step) * (int(steps) - int(step))
    return f"step {step}/{steps}  KL {float(kl):.4f}  {ratio}  {left:.0f} s left"


def export(run: Path, step: int, folder: Path) -> None:
    """Export the checkpoint of a step as an HF folder; an old folder is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    python(ROOT / "tools/convert.py", "export", "--hf", folder, "--megatron", run, "--iteration", step)


def python(script: Path, *arguments: object) -> str:
    """Run one of this repository's scripts and return its stdout.

    Raises:
        SystemExit: the script failed. The message is everything that the script printed.
    """
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{script.name} failed with exit code {done.returncode}")
    return done.stdout
