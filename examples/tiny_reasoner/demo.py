"""Run everything from a fresh clone on a CPU: import, retrofit on four ranks, export, generate, compare.

The tiny reasoner is imported into Megatron (TP 2 x PP 2 from here on). Its borrowed query channel fades out,
and the model learns to evict: CR 4 first, and CR 8 later in the same run. Both checkpoints are exported to HF
format and answer held-out problems with hard eviction, and so does the teacher without eviction.

Run: make demo, or python examples/tiny_reasoner/demo.py --out out/demo
"""

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from compare import PICTURE, compare
from measure import HELDOUT_SEED
from run_retrofit import ROOT, Retrofit, export, python, tokenize, train

HERE = Path(__file__).resolve().parent
BASE = HERE / "base"
LAYOUT = {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}
VALIDATION_PROBLEMS = 32  # two evaluation steps of 16 samples


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    retrofit: Retrofit
    train_problems: int
    heldout_problems: int


FULL = Size(Retrofit(zeroing_steps=60, steps_per_cr=60), train_problems=4000, heldout_problems=500)
SHORT = Size(Retrofit(zeroing_steps=4, steps_per_cr=4), train_problems=64, heldout_problems=8)


def run_demo(out: Path, size: Size) -> dict[str, object]:
    """Do everything, write `out`/summary.json and return its content."""
    begin = time.monotonic()
    work = out / "work"
    for old in (work, out / "tensorboard"):
        shutil.rmtree(old, ignore_errors=True)
    for old in (out / "summary.json", out / "retrofit.log", out / PICTURE):
        old.unlink(missing_ok=True)
    work.mkdir(parents=True)
    _say("1/5 problems and their tokens")
    tokenize(BASE, work / "train", "train", size.train_problems, seed=1)
    tokenize(BASE, work / "valid", "heldout", VALIDATION_PROBLEMS, seed=3000)
    _say("2/5 import into Megatron")
    python(ROOT / "tools/convert.py", "import", "--hf", BASE, "--megatron", work / "base")
    retrofit = size.retrofit
    _say(f"3/5 retrofit on 4 ranks (TP 2 x PP 2), {retrofit.steps} steps")
    more = {
        # Both checkpoints are at multiples of this, as the zeroing phase is as long as one unit of CR.
        "--save-interval": retrofit.step_of(4),
        "--eval-interval": retrofit.step_of(4),
        "--eval-iters": 2,
        "--valid-data-path": work / "valid",
        "--tensorboard-dir": out / "tensorboard",
    }
    folders = {"base": work / "base", "data": work / "train", "run": work / "run"}
    train(retrofit, **folders, log=out / "retrofit.log", layout=LAYOUT, more=more, progress=_progress)
    print(flush=True)
    _say("4/5 export CR 4 and CR 8 from the one run")
    models = {"teacher": BASE}
    for cr in (4, 8):
        models[f"cr{cr}"] = out / f"cr{cr}"
        export(work / "run", retrofit.step_of(cr), models[f"cr{cr}"])
    _say("5/5 generate answers to held-out problems with hard eviction")
    results = compare(models, size.heldout_problems, HELDOUT_SEED, out)
    summary = {
        **results,
        "heldout_problems": size.heldout_problems,
        "wall_seconds": time.monotonic() - begin,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _progress(text: str) -> None:
    print(f"\r  {text}   ", end="", flush=True)


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
