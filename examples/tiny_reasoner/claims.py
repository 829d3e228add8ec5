"""The paper's claims in miniature: many retrofits of the tiny reasoner on its harder task, on a CPU.

    python examples/tiny_reasoner/claims.py delayed     delayed against immediate eviction (Figure 5, left)
    python examples/tiny_reasoner/claims.py data        training tokens for a CR, DMS, DMC (Figure 5, right)
    python examples/tiny_reasoner/claims.py methods     DMS, TOVA, H2O, Quest, window, vanilla (Figure 3)
    python examples/tiny_reasoner/claims.py where       where the cache is spent (Figure 6)
    python examples/tiny_reasoner/claims.py ablations   predictor, what is trained, lag, window, KL, steps
    python examples/tiny_reasoner/claims.py long        students that regain their teacher's accuracy; hours

Each claim trains the trials that it needs and that --work does not hold yet, measures them, and writes
CLAIM.json and CLAIM.png to --out. Claims share their trials (trials.py), and an interrupted claim goes on
where it stopped. docs/experiments.md has the results and the times.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import claim_figures
from run_retrofit import ROOT, python
from trials import (
    BASE,
    DIFFICULTY,
    ENDS,
    LONG_TRIALS,
    TRIALS,
    WINDOW,
    heldout_set,
    measure_teacher,
    problems_file,
    run_trials,
    write_json,
)

import megatron_dms
from megatron_dms.provenance import made_by

HERE = Path(__file__).resolve().parent
SEEDS = [1, 2, 3]
PROBLEMS = 300  # held-out problems of every measurement except `methods`
METHODS = ("vanilla", "dms", "tova", "h2o", "quest", "window")
BUDGETS = [f"{chains}-192-{cr}" for cr in (1, *ENDS) for chains in (1, 2, 4)]
METHODS_PROBLEMS = 100
WHERE_PROBLEMS = 100


def delayed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure accuracy along the ladder of CRs when a pair is judged at once and when it leaves the
    window."""
    return {"teacher": _teacher(options), "trials": _trials(("dms", "immediate"), options)}


def data(options: argparse.Namespace) -> dict[str, Any]:
    """Climb the ladder with fewer and with more steps."""
    names = ("steps-10", "dms", "steps-60", "dmc-10", "dmc-30", "dmc-60")
    return {"teacher": _teacher(options), "trials": _trials(names, options)}


def ablations(options: argparse.Namespace) -> dict[str, Any]:
    """Change one setting at a time."""
    names = [name for name in TRIALS if not name.startswith("dmc")]
    return {"teacher": _teacher(options), "trials": _trials(names, options)}


def where(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the share of pairs kept by layer and KV head, and by position in the text, on solved
    problems."""
    from where import kept_fractions

    _trials(("dms",), options)
    texts = heldout_set(WHERE_PROBLEMS)
    seeds = {}
    for seed in options.seeds:
        folder = options.work / f"dms-seed{seed}"
        seeds[str(seed)] = {str(cr): kept_fractions(folder / f"cr{cr}", texts) for cr in ENDS}
    return {"window": WINDOW, "problems": WHERE_PROBLEMS, "seeds": seeds}


def long(options: argparse.Namespace) -> dict[str, Any]:
    """Measure accuracy along the ladder with 13 times the training tokens per unit of CR."""
    return {"teacher": _teacher(options), "trials": _trials(options.trials or ("long-4",), options)}


def methods(options: argparse.Namespace) -> dict[str, Any]:
    """Run tools/evaluate.py at budgets W-L-CR; each seed has DMS models and samples of its own."""
    _trials(("dms",), options)
    problems = problems_file(options.work, METHODS_PROBLEMS)
    seeds = {}
    for seed in options.seeds:
        out = options.work / f"methods-seed{seed}"
        dms = [
            word for cr in ENDS for word in ("--dms", f"{cr}={options.work / f'dms-seed{seed}' / f'cr{cr}'}")
        ]
        said = python(
            ROOT / "tools/evaluate.py",
            *("run", "--task", "tiny_reasoner", "--data", problems, "--model", BASE, *dms),
            *("--methods", ",".join(METHODS), "--budgets", ",".join(BUDGETS), "--seeds", seed),
            *("--temperature", 1, "--top-p", 1, "--batch-size", 50, "--dtype", "float32", "--out", out),
        )
        options.say(f"seed {seed}\n{said[: said.rindex('{')]}")
        results = json.loads((out / "results.json").read_text())
        seeds[str(seed)] = results
    return {"problems": METHODS_PROBLEMS, "seeds": seeds}


CLAIMS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "delayed": delayed,
    "data": data,
    "methods": methods,
    "where": where,
    "ablations": ablations,
    "long": long,
}


def _trials(names: Any, options: argparse.Namespace) -> dict[str, Any]:
    return run_trials(names, options.seeds, options.work, PROBLEMS, options.jobs, options.say)


def _teacher(options: argparse.Namespace) -> dict[str, float]:
    """Measure the base model on the same problems."""
    return measure_teacher(options.work, PROBLEMS)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="The paper's claims in miniature.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("claim", choices=CLAIMS, help="the claim to test")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, help="seeds of data order, noise and sampling"
    )
    parser.add_argument("--trials", nargs="+", choices=LONG_TRIALS, help="the ladders of claim long")
    parser.add_argument("--jobs", type=int, default=2, help="retrofits that run at a time, one CPU core each")
    parser.add_argument("--work", type=Path, default=Path("out/claims"), help="folder of all trials")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of results and pictures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Test one claim and end with one JSON line."""
    options = parse_arguments(argv)
    if options.jobs < 1 or len(set(options.seeds)) < len(options.seeds):
        print("claims.py: --jobs must be 1 or more, and no seed may come twice", file=sys.stderr)
        return 2
    installed = Path(megatron_dms.__file__).resolve().parents[1]
    if installed != ROOT:  # training would run this checkout's code and measuring the other's
        print(f"claims.py: megatron_dms is imported from {installed}, not from {ROOT}", file=sys.stderr)
        return 2
    options.work = options.work.resolve()
    options.say = lambda text: print(text, flush=True)
    begin = time.monotonic()
    try:
        result = CLAIMS[options.claim](options)
    except ValueError as error:
        print(f"claims.py: {error}", file=sys.stderr)
        return 2
    command = (
        f"python examples/tiny_reasoner/claims.py {options.claim} --seeds {' '.join(map(str, options.seeds))}"
    )
    about = {"command": command, "made_by": made_by(), "problems": PROBLEMS, "difficulty": DIFFICULTY}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{options.claim}.json", {**about, **result})
    claim_figures.draw(options.claim, result, options.out / f"{options.claim}.png")
    print(json.dumps({"claim": options.claim, "out": str(options.out), "seconds": time.monotonic() - begin}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
