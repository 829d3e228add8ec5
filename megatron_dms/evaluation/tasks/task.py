"""What all tasks share: problems, and the grades of the W chains that answer a problem."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dms.evaluation.answers import answer_classes
from megatron_dms.evaluation.statistics import majority_vote


@dataclass(frozen=True)
class Problem:
    """One question. The model is given either `messages` or `prompt`."""

    id: str
    messages: list[dict[str, str]]
    """A chat that ends with the user's turn; empty if there is a `prompt`."""
    gold: Any
    """The right answer, in the form that the task's grader needs."""
    prompt: str | None = None
    """A text to continue, for models without a chat template."""

    @property
    def content(self) -> str | list[dict[str, str]]:
        """The question as inference/prompts.py takes it."""
        return self.messages if self.prompt is None else self.prompt


@dataclass(frozen=True)
class Graded:
    """The grade of one chain."""

    answer: str | None
    """The answer that was found in the text; None if there is no answer, which is never correct."""
    correct: bool


@dataclass(frozen=True)
class Grades:
    """The grades of the W chains of a problem, in the order of the chains."""

    chains: list[Graded]
    classes: list[int | None]
    """Equal numbers for equal answers, None for no answer; `statistics.majority_vote` takes them."""

    @property
    def correct(self) -> list[bool]:
        return [chain.correct for chain in self.chains]


@dataclass(frozen=True)
class Task:
    """Problems, and how answers to them are graded."""

    name: str
    by_vote: bool
    """When a problem counts as solved. True: the majority vote of its chains is correct. False: any chain is
    correct; this is for code, because programs cannot be compared."""
    problems: list[Problem]
    grader: Callable[[Problem, Sequence[str]], Grades]
    notice: str | None = None
    """A line to say before anything starts: what grading does beyond reading texts."""

    def grade(self, problem: Problem, texts: Sequence[str]) -> Grades:
        """Grade all chains of one problem. Mathematics is graded in the main thread only (see answers.py).

        Args:
            problem: one of `problems`.
            texts: [W], the generated text of each chain, without the prompt.

        Raises:
            ValueError: there are no texts.
        """
        if not texts:
            raise ValueError(f"task {self.name}, problem {problem.id}: found no texts, expected at least one")
        return self.grader(problem, texts)

    def solved(self, grades: Grades) -> bool:
        """Whether the problem counts as solved (see `by_vote`)."""
        if not self.by_vote:
            return any(grades.correct)
        chosen = majority_vote(grades.classes)
        return chosen is not None and grades.chains[chosen].correct


def grades_of[T](
    answers: Sequence[T | None],
    right: Callable[[T], bool],
    equal: Callable[[T, T], bool] = lambda a, b: a == b,
    show: Callable[[T], str] = str,
) -> Grades:
    """Grade the answers that were found in the texts.

    Args:
        answers: [W], None for no answer.
        right: tells whether an answer is correct.
        equal: tells whether two answers are the same, for the vote.
        show: returns an answer as text.
    """
    chains = [
        Graded(None, False) if answer is None else Graded(show(answer), right(answer)) for answer in answers
    ]
    return Grades(chains, answer_classes(answers, equal))


def ask(text: str) -> list[dict[str, str]]:
    """Return a chat that consists of one question."""
    return [{"role": "user", "content": text}]
