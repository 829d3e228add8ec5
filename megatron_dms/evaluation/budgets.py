"""Budgets W-L-CR: W chains of at most L generated tokens each, at a compression ratio; and who runs which.

Imports nothing heavy.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dms.inference.baselines import METHODS as PLAIN_METHODS

METHODS = ("dms", *PLAIN_METHODS)
# A CR of no more digits than `str` shows: two budgets never share a file.
_BUDGET = re.compile(r"([1-9]\d{0,8})-([1-9]\d{0,8})-([1-9]\d{0,2}(?:\.\d{1,3})?)", re.ASCII)
_RUN = re.compile(r"([a-z0-9]+)-(.+)-seed(0|[1-9]\d*)", re.ASCII)


@dataclass(frozen=True, order=True)
class Budget:
    """The paper's W-L-CR."""

    chains: int
    """W, sampled from one prompt."""
    length: int
    """L, in generated tokens of a chain; the prompt is not counted."""
    cr: float
    """Compression ratio asked for; 1 keeps every pair."""

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """From "4-8192-8".

        Raises:
            ValueError: it does not have that form.
        """
        match = _BUDGET.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"budget {text!r} is not W-L-CR, such as 4-8192-8: numbers from 1 on, CR below 1000 with at "
                "most 3 decimals"
            )
        return cls(int(match[1]), int(match[2]), float(match[3]))

    def __str__(self) -> str:
        return f"{self.chains}-{self.length}-{self.cr:g}"


@dataclass(frozen=True)
class Run:
    """One method at one budget with one seed: a file of samples."""

    method: str
    budget: Budget
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.budget}-seed{self.seed}"

    @classmethod
    def parse(cls, text: str) -> "Run":
        """From what `str` gives.

        Raises:
            ValueError: it does not have that form.
        """
        match = _RUN.fullmatch(text)
        if match is None or match[1] not in METHODS:
            raise ValueError(f"{text!r} is no METHOD-W-L-CR-seedN")
        return cls(match[1], Budget.parse(match[2]), int(match[3]))

    @property
    def place(self) -> tuple[int, Budget, int]:
        """To sort by: methods as in METHODS, budgets and seeds as numbers."""
        return METHODS.index(self.method), self.budget, self.seed


def plan(methods: Sequence[str], budgets: Sequence[Budget], seeds: Sequence[int]) -> list[Run]:
    """Who runs what: vanilla the budgets of CR 1, all others those above.

    Raises:
        ValueError: an unknown method; something is named twice; a method or a budget has nothing to run.
    """
    for name, values in (("method", methods), ("budget", budgets), ("seed", seeds)):
        twice = [str(value) for i, value in enumerate(values) if value in values[:i]]
        if not values or twice:
            raise ValueError(f"{name} {twice[0]} is named twice" if twice else f"no {name} is named")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"method {unknown[0]!r} is unknown, expected some of {', '.join(METHODS)}")
    runs = [
        Run(method, budget, seed)
        for method in methods
        for budget in budgets
        for seed in seeds
        if (method == "vanilla") == (budget.cr == 1)
    ]
    for method in methods:
        if not any(run.method == method for run in runs):
            wanted = "of CR 1" if method == "vanilla" else "above CR 1"
            raise ValueError(f"method {method} has nothing to run: no budget {wanted}")
    for budget in budgets:
        if not any(run.budget == budget for run in runs):
            wanted = "vanilla" if budget.cr == 1 else "a method other than vanilla"
            raise ValueError(f"budget {budget} has nothing to run: it needs {wanted}")
    return runs
