"""Compare a teacher with its retrofitted students: accuracy, compression, KV reads, peak cache.

All figures are measured while the models generate greedily with hard eviction, in left-padded batches.

Run: python examples/tiny_reasoner/compare.py --teacher BASE --student cr4=DIR --student cr8=DIR --out DIR
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from answers import exact_match, standard_error
from measure import BATCH, HELDOUT_SEED, greedy_texts, heldout_problems

from megatron_dms.evaluation.statistics import decisions
from megatron_dms.inference.baselines import load_plain
from megatron_dms.inference.loading import load_model, load_tokenizer
from megatron_dms.text_table import RULE, text_table

PICTURE = "accuracy_vs_kv_reads.png"


def measure_folder(folder: Path, problems: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Load a model and measure it. An exported checkpoint runs its own code, a plain one uses the same
    cache."""
    exported = "auto_map" in json.loads((folder / "config.json").read_text())
    model = (
        load_model(folder, "float32", "cpu", "torch") if exported else load_plain(folder, "float32", "cpu")
    )
    return measure_model(model, load_tokenizer(folder), problems)


def measure_model(model: Any, tokenizer: Any, problems: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Measure accuracy and cost of one model.

    Returns:
        accuracy and its standard error; achieved_cr = 1 / (1 - mean decision) over all pairs; kv_reads per
        problem and peak_tokens in the cache, both as numbers of pairs averaged over layers and KV heads.
    """
    texts: list[str] = []
    reads: list[float] = []
    peaks: list[float] = []
    evicted = decided = 0.0
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        texts += greedy_texts(model, tokenizer, batch, BATCH)
        stats = model.last_kv_stats
        reads += stats.kv_reads
        peaks += stats.peak_tokens
        count = decisions(stats.tokens_seen, model.dms_settings.lag)
        evicted, decided = evicted + stats.evicted_fraction * count, decided + count
    hits = exact_match(texts, [problem["answer"] for problem in problems])
    accuracy = sum(hits) / len(hits)
    return {
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, len(hits)),
        "achieved_cr": 1 / (1 - evicted / decided),
        "kv_reads": sum(reads) / len(reads),
        "peak_tokens": sum(peaks) / len(peaks),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the comparison as text, with one line for each model."""
    lines = [["model", "accuracy", "achieved CR", "KV reads", "peak tokens"], RULE]
    for name, row in results.items():
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f} %"
        costs = [f"{row['achieved_cr']:.2f}", f"{row['kv_reads']:.0f}", f"{row['peak_tokens']:.1f}"]
        lines.append([name, accuracy, *costs])
    return text_table(lines, align="<>")


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Draw accuracy against KV reads, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, row in results.items():
        label = f"{name} (CR {row['achieved_cr']:.1f})"
        axes.errorbar(
            row["kv_reads"],
            100 * row["accuracy"],
            100 * row["standard_error"],
            fmt="o",
            capsize=3,
            label=label,
        )
    axes.set(xlabel="KV reads per problem (pairs, mean of layers and KV heads)", ylabel="exact answers, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def compare(models: dict[str, Path], count: int, seed: int, out: Path) -> dict[str, dict[str, float]]:
    """Measure each model on the same held-out problems, print the table and write the picture."""
    problems = heldout_problems(count, seed)
    results = {}
    for name, folder in models.items():
        print(f"generating {count} answers with {name} ...", flush=True)
        results[name] = measure_folder(folder, problems)
    print(table(results))
    out.mkdir(parents=True, exist_ok=True)
    draw(results, out / PICTURE)
    return results


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Accuracy and KV cost of a teacher and its retrofitted students on held-out problems.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--teacher", type=Path, required=True, help="HF folder of the dense model")
    parser.add_argument(
        "--student", action="append", default=[], help="NAME=DIR, an exported DMS model; may be repeated"
    )
    parser.add_argument("--count", type=int, default=500, help="held-out problems")
    parser.add_argument("--seed", type=int, default=HELDOUT_SEED, help="seed of the held-out problems")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the picture")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare the models and end with one JSON line."""
    args = parse_arguments(argv)
    students = {name: Path(folder) for name, folder in (item.split("=", 1) for item in args.student)}
    print(json.dumps(compare({"teacher": args.teacher, **students}, args.count, args.seed, args.out)))


if __name__ == "__main__":
    main()
