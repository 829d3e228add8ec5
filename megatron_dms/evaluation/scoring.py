"""Score samples: accuracy with its uncertainty, and what the answers cost. Needs no model.

Seeds are averaged for each problem first; intervals are over problems (see statistics.py).

Shapes: P problems, S seeds, W chains.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any

from megatron_dms.evaluation.budgets import Budget
from megatron_dms.evaluation.samples import Sample
from megatron_dms.evaluation.statistics import (
    Estimate,
    average_at_w,
    compression_ratio,
    mean_over_problems,
    paired_difference,
    pass_at_k,
)
from megatron_dms.evaluation.tasks import Problem, Task
from megatron_dms.text_table import RULE, text_table


@dataclass(frozen=True)
class Scored:
    """A method at a budget, and what one problem costs with all its chains."""

    method: str
    budget: Budget
    _: KW_ONLY
    kv_reads: float
    """In pairs, mean over layers and KV heads, summed over steps and chains."""
    dense_kv_reads: float
    peak_tokens: float
    """In pairs, mean over layers and KV heads, summed over chains: all chains are held together."""
    peak_bytes: float
    """Allocated for keys and values; the problem's share of its batch."""
    generated_tokens: float
    truncated: float
    """Share of the chains that were cut off at L tokens."""
    looping: float
    """Share of the chains that were repeating themselves when they were cut off."""
    seconds: float
    """Wall time; the problem's share of its batch. It depends on the machine and the batch size."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields, with the budget as text."""
        return {**asdict(self), "budget": str(self.budget)}


COSTS = tuple(field.name for field in fields(Scored) if field.kw_only)


@dataclass(frozen=True)
class ProblemScore(Scored):
    """The score of one problem; all figures are means over seeds."""

    id: str
    answers: dict[int, list[str | None]]
    """What was found in each chain, by seed."""
    accuracy: float
    """Share of the seeds whose majority vote solves the problem."""
    average: float
    """avg@W."""
    passed: float
    """pass@W, unbiased, from the chains of all seeds."""


@dataclass(frozen=True)
class MethodScore(Scored):
    """The score over all problems: means of the fields of the same name in ProblemScore."""

    seeds: int
    accuracy: Estimate
    """Share of problems that the majority vote solves; in tasks without votes (code), those that any chain
    does."""
    average: Estimate
    passed: Estimate
    achieved_cr: float | None
    """1 / (1 - evicted fraction) over all pairs that were decided on; None if it is unbounded. Quest has 1:
    it evicts no pair and reads fewer pairs."""


def score_problems(
    task: Task, method: str, budget: Budget, by_seed: Mapping[int, Sequence[Sample]]
) -> list[ProblemScore]:
    """Grade all samples of a method at a budget.

    Args:
        task: has the problems of the samples, in the same order.
        by_seed: for each seed the samples of all problems, [P].

    Returns:
        [P], a score for each problem.

    Raises:
        ValueError: samples are missing, or are of other problems.
    """
    ids = [problem.id for problem in task.problems]
    for seed, samples in by_seed.items():
        found = [sample.id for sample in samples]
        if found != ids:
            what = f"{len(found)} of {len(ids)} problems" if found == ids[: len(found)] else "other problems"
            raise ValueError(f"the samples of {method}-{budget}, seed {seed}, are of {what}: generate them")
    return [
        _score_problem(task, problem, method, budget, {seed: samples[i] for seed, samples in by_seed.items()})
        for i, problem in enumerate(task.problems)
    ]


def _score_problem(
    task: Task, problem: Problem, method: str, budget: Budget, by_seed: Mapping[int, Sample]
) -> ProblemScore:
    grades = {
        seed: task.grade(problem, [chain.text for chain in sample.chains]) for seed, sample in by_seed.items()
    }
    correct_X = [right for found in grades.values() for right in found.correct]  # X: the chains of all seeds
    chains_X = [chain for sample in by_seed.values() for chain in sample.chains]
    batches_S = [sample.batch for sample in by_seed.values()]
    S, X = len(by_seed), len(chains_X)
    return ProblemScore(
        method=method,
        budget=budget,
        id=problem.id,
        answers={seed: [chain.answer for chain in found.chains] for seed, found in grades.items()},
        accuracy=sum(map(task.solved, grades.values())) / S,
        average=average_at_w(correct_X),
        passed=pass_at_k(X, sum(correct_X), budget.chains),
        kv_reads=sum(chain.kv_reads for chain in chains_X) / S,
        dense_kv_reads=sum(chain.dense_kv_reads for chain in chains_X) / S,
        peak_tokens=sum(chain.peak_tokens for chain in chains_X) / S,
        peak_bytes=sum(batch.peak_bytes / batch.problems for batch in batches_S) / S,
        generated_tokens=sum(chain.tokens for chain in chains_X) / S,
        truncated=sum(not chain.ended for chain in chains_X) / X,
        looping=sum(chain.loops for chain in chains_X) / X,
        seconds=sum(batch.seconds / batch.problems for batch in batches_S) / S,
    )


def summarise(problems: Sequence[ProblemScore], by_seed: Mapping[int, Sequence[Sample]]) -> MethodScore:
    """Return the score of a method at a budget.

    Args:
        problems: the scores of all problems.
        by_seed: the samples that those scores were made from.
    """
    batches = {(seed, sample.batch.index): sample.batch for seed, s in by_seed.items() for sample in s}
    decided = sum(batch.decided for batch in batches.values())
    evicted = sum(batch.evicted_fraction * batch.decided for batch in batches.values()) / max(decided, 1)
    return MethodScore(
        method=problems[0].method,
        budget=problems[0].budget,
        seeds=len(by_seed),
        accuracy=mean_over_problems([problem.accuracy for problem in problems]),
        average=mean_over_problems([problem.average for problem in problems]),
        passed=mean_over_problems([problem.passed for problem in problems]),
        achieved_cr=compression_ratio(evicted),
        **{name: sum(getattr(problem, name) for problem in problems) / len(problems) for name in COSTS},
    )


@dataclass(frozen=True)
class Difference:
    """By how much a method is more accurate than vanilla with the same number and length of chains."""

    method: str
    budget: Budget
    accuracy: Estimate
    """The difference, problem by problem."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields, with the budget as text."""
        return {**asdict(self), "budget": str(self.budget)}

    def __str__(self) -> str:
        points = 100 * self.accuracy.mean, 100 * self.accuracy.low, 100 * self.accuracy.high
        return "{} {}: {:+.1f} [{:+.1f}, {:+.1f}] points".format(self.method, self.budget, *points)


def differences(problems: Sequence[ProblemScore]) -> list[Difference]:
    """Compare every method and budget with vanilla, if vanilla has run the same W and L.

    Args:
        problems: the scores of all methods and budgets, each on the same problems in the same order.
    """
    grouped: dict[tuple[str, Budget], list[float]] = {}
    for problem in problems:
        grouped.setdefault((problem.method, problem.budget), []).append(problem.accuracy)
    found = []
    for (method, budget), accuracies in grouped.items():
        dense = grouped.get(("vanilla", Budget(budget.chains, budget.length, 1.0)))
        if method != "vanilla" and dense is not None:
            found.append(Difference(method, budget, paired_difference(accuracies, dense)))
    return found


_COLUMNS: dict[str, Callable[[MethodScore], str]] = {
    "seeds": lambda score: f"{score.seeds}",
    "accuracy": lambda score: _interval(score.accuracy),
    "avg@W": lambda score: _interval(score.average),
    "pass@W": lambda score: _interval(score.passed),
    "achieved CR": lambda score: "-" if score.achieved_cr is None else f"{score.achieved_cr:.2f}",
    "KV reads": lambda score: f"{score.kv_reads:.0f}",
    "dense": lambda score: f"{score.dense_kv_reads:.0f}",
    "peak tokens": lambda score: f"{score.peak_tokens:.1f}",
    "bytes": lambda score: f"{score.peak_bytes:.0f}",
    "tokens": lambda score: f"{score.generated_tokens:.0f}",
    "cut %": lambda score: f"{100 * score.truncated:.1f}",
    "loop %": lambda score: f"{100 * score.looping:.1f}",
    "seconds": lambda score: f"{score.seconds:.3f}",
}


def cells(score: MethodScore) -> dict[str, str]:
    """Return the cells of a table's line, by heading."""
    head = {"method": score.method, "W-L-CR": str(score.budget)}
    return head | {heading: cell(score) for heading, cell in _COLUMNS.items()}


def table(scores: Sequence[MethodScore]) -> str:
    """Return a table with a line for each method and budget.

    Accuracies are in percent, with 95 % intervals; costs are costs of one problem.

    Args:
        scores: at least one.
    """
    lines = [cells(score) for score in scores]
    return text_table([list(lines[0]), RULE, *(list(line.values()) for line in lines)], align="<>")


def _interval(estimate: Estimate) -> str:
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.mean:.1f} [{low:.1f}, {high:.1f}]"
