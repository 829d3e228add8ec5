"""The whole way, from a fresh clone, on a CPU: import, retrofit on four ranks, export, generate, compare.

The tiny reasoner is imported into Megatron (TP 2 x PP 2 from here on), its borrowed query channel is faded
out, and it learns to evict, CR 4 first and CR 8 later in the same run. Both checkpoints are exported to HF
format and answer held-out problems with hard eviction, beside the teacher.

Run: make demo, or python examples/tiny_reasoner/demo.py --out out/demo
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compare import PICTURE, compare
from measure import HELDOUT_SEED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BASE = HERE / "base"
LAYOUT = {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}
RANKS = 4
# "iteration      12/     480 | ... | KL: 1.2E-02 | ... | achieved CR (hard): 1.0E+00 |" in Megatron's log
_LOGGED = re.compile(
    r"iteration\s+(\d+)/\s*(\d+) \|.*?KL: ([\d.E+-]+).*?target CR: ([\d.E+-]+)"
    r".*?achieved CR \(hard\): ([\d.E+-]+)"
)
VALIDATION_PROBLEMS = 32  # two evaluation steps of 16 samples


@dataclass(frozen=True)
class Recipe:
    """Settings of the demo's retrofit."""

    zeroing_steps: int
    """Steps that fade the borrowed channel out."""
    steps_per_cr: int
    """Steps per unit of compression ratio: CR 4 takes 3 of these, CR 8 takes 7."""
    train_problems: int
    heldout_problems: int
    window: int = 16
    """Tokens; the demo's problems are about 250 tokens long."""
    batch: int = 16
    """Samples per step."""
    learning_rate: float = 8e-4

    def step_of(self, cr: int) -> int:
        """The training step whose checkpoint is the CR-`cr` model."""
        return self.zeroing_steps + (cr - 1) * self.steps_per_cr


FULL = Recipe(zeroing_steps=60, steps_per_cr=60, train_problems=4000, heldout_problems=500)
SHORT = Recipe(zeroing_steps=4, steps_per_cr=4, train_problems=64, heldout_problems=8)
SEQUENCE = 288  # tokens; longer than any problem


def run_demo(out: Path, recipe: Recipe) -> dict[str, object]:
    """Do everything and write `out`/summary.json; -> its content."""
    begin = time.monotonic()
    work = out / "work"
    for old in (work, out / "tensorboard"):
        shutil.rmtree(old, ignore_errors=True)
    for old in (out / "summary.json", out / PICTURE):
        old.unlink(missing_ok=True)
    work.mkdir(parents=True)
    _say("1/5 problems and their tokens")
    _tokenize(work / "train", "train", recipe.train_problems, seed=1)
    _tokenize(work / "valid", "heldout", VALIDATION_PROBLEMS, seed=3000)
    _say("2/5 import into Megatron")
    _python(ROOT / "tools/convert.py", "import", "--hf", BASE, "--megatron", work / "base")
    _say(f"3/5 retrofit on {RANKS} ranks (TP 2 x PP 2), {recipe.step_of(8)} steps")
    _retrofit(work, recipe, out / "retrofit.log")
    _say("4/5 export CR 4 and CR 8 from the one run")
    models = {"teacher": BASE}
    for cr in (4, 8):
        models[f"cr{cr}"] = out / f"cr{cr}"
        shutil.rmtree(models[f"cr{cr}"], ignore_errors=True)
        source = ("--megatron", work / "run", "--iteration", recipe.step_of(cr))
        _python(ROOT / "tools/convert.py", "export", "--hf", models[f"cr{cr}"], *source)
    _say("5/5 generate answers to held-out problems with hard eviction")
    results = compare(models, recipe.heldout_problems, HELDOUT_SEED, out)
    summary = {
        **results,
        "heldout_problems": recipe.heldout_problems,
        "wall_seconds": time.monotonic() - begin,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _tokenize(prefix: Path, split: str, count: int, seed: int) -> None:
    """Problems as Megatron's .bin/.idx. All tokens are targets: the base model was trained on all, and
    prompts keep the fading phase gentle."""
    problems = prefix.with_suffix(".jsonl")
    flags = ("--split", split, "--count", count, "--seed", seed, "--out", problems)
    _python(HERE / "problems.py", *flags)
    tokens = ("--tokenizer", BASE, "--output-prefix", prefix, "--loss-on", "all")
    _python(ROOT / "tools/preprocess_data.py", "--input", problems, *tokens)


def _retrofit(work: Path, recipe: Recipe, log: Path) -> None:
    flags = {
        **LAYOUT,
        "--pretrained-checkpoint": work / "base",
        "--load": work / "run",
        "--save": work / "run",
        "--train-data-path": work / "train",
        "--seq-length": SEQUENCE,
        "--micro-batch-size": recipe.batch // 2,
        "--global-batch-size": recipe.batch,
        "--train-iters": recipe.step_of(8),
        # Both checkpoints lie on multiples of this: the zeroing phase is as long as one unit of CR.
        "--save-interval": recipe.step_of(4),
        "--eval-interval": recipe.step_of(4),
        "--eval-iters": 2,
        "--valid-data-path": work / "valid",
        "--lr": recipe.learning_rate,
        "--min-lr": recipe.learning_rate / 10,
        "--lr-decay-style": "linear",
        "--lr-warmup-iters": recipe.zeroing_steps // 4,
        "--adam-beta2": 0.95,
        "--weight-decay": 0,
        "--clip-grad": 1.0,
        "--log-interval": 5,
        "--tensorboard-dir": log.parent / "tensorboard",
        "--dms-teacher": work / "base",
        "--dms-window": recipe.window,
        "--dms-zeroing-steps": recipe.zeroing_steps,
        "--dms-steps-per-cr": recipe.steps_per_cr,
        "--dms-final-cr": 8,
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(RANKS),
        "--master-port",
        str(port),
    ]
    command = [
        *launcher,
        str(ROOT / "pretrain_dms.py"),
        *(str(word) for pair in flags.items() for word in pair),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out, subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        begin = time.monotonic()
        for line in process.stdout:
            out.write(line)
            if logged := _LOGGED.search(line):
                _progress(logged, time.monotonic() - begin)
    print(flush=True)
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-30:])
        raise SystemExit(f"{tail}\ndemo: the retrofit failed with exit code {process.returncode}; see {log}")


def _progress(logged: re.Match[str], seconds: float) -> None:
    step, steps, kl, target, achieved = logged.groups()
    ratio = f"CR {float(achieved):.2f} (target {float(target):.2f})"
    left = seconds / int(step) * (int(steps) - int(step))
    print(f"\r  step {step}/{steps}  KL {float(kl):.4f}  {ratio}  {left:.0f} s left   ", end="", flush=True)


def _python(script: Path, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"{done.stdout}{done.stderr}\ndemo: {script.name} failed with exit code {done.returncode}"
        )


def _say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        description="Retrofit the tiny reasoner on four CPU ranks, export, generate, compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for results")
    parser.add_argument(
        "--short", action="store_true", help="a few steps only: shows that it runs, learns nothing"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    summary = run_demo(args.out.resolve(), SHORT if args.short else FULL)
    print(f"[demo] {summary['wall_seconds']:.0f} s; results in {args.out}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
