"""Budgets W-L-CR: W chains of at most L generated tokens at a compression ratio; and which method runs which.

Imports nothing heavy.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dms.inference.baselines import METHODS as PLAIN_METHODS

METHODS = ("dms", *PLAIN_METHODS)
# The CR has no more digits than `str` shows, so two budgets never share a file.
_BUDGET = re.compile(r"([1-9]\d{0,8})-([1-9]\d{0,8})-([1-9]\d{0,2}(?:\.\d{1,3})?)", re.ASCII)
_RUN = re.compile(r"([a-z0-9]+)-(.+)-seed(0|[1-9]\d*)", re.ASCII)


@dataclass(frozen=True, order=True)
class Budget:
    """The paper's W-L-CR."""

    chains: int
    """W: number of chains sampled from one prompt."""
    length: int
    """L: most generated tokens of a chain, without the prompt."""
    cr: float
    """Compression ratio that is asked for; 1 keeps every pair."""

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read a budget such as "4-8192-8".

        Raises:
            ValueError: the text does not have that form.
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
    """One method at one budget with one seed; it has a file of samples of its own."""

    method: str
    budget: Budget
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.budget}-seed{self.seed}"

    @classmethod
    def parse(cls, text: str) -> "Run":
        """Read a run from the text that `str` gives.

        Raises:
            ValueError: the text does not have that form.
        """
        match = _RUN.fullmatch(text)
        if match is None or match[1] not in METHODS:
            raise ValueError(f"{text!r} is no METHOD-W-L-CR-seedN")
        return cls(match[1], Budget.parse(match[2]), int(match[3]))

    @property
    def place(self) -> tuple[int, Budget, int]:
        """The sort key: methods in the order of METHODS, then budgets and seeds as numbers."""
        return METHODS.index(self.method), self.budget, self.seed


def plan(methods: Sequence[str], budgets: Sequence[Budget], seeds: Sequence[int]) -> list[Run]:
    """Return all runs: vanilla at the budgets with CR 1, the other methods at all other budgets.

    Raises:
        ValueError: a method is unknown; something is named twice; a method or a budget has nothing to run.
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
