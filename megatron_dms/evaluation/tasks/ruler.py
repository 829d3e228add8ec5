"""Generated long-context tasks in the manner of RULER: needles in a haystack, and variable tracking.

RULER is arXiv 2404.06654. All texts are this project's own, so figures are not comparable with RULER's.

Problem number i is a function of the seed, i, the options and the tokenizer. The prompt as the model gets it
(rendered by the chat template, if the tokenizer has one) has at most `length` tokens, and one more sentence
would not fit. The tokens that the model generates come on top.

A chain is correct if it names everything that is asked for, as in RULER; naming more does no harm. If the
text has a </think>, only the part after the last </think> counts.
"""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_dms.evaluation.tasks.ruler_text import keys, sentence
from megatron_dms.evaluation.tasks.task import Grades, Problem, Task, ask, grades_of
from megatron_dms.inference.prompts import Prompt

PROBLEMS = 100
"""Number of problems that are generated if no limit is given."""
FIND = "Some secret numbers are hidden in the following text. Remember them.\n\n{text}\n\n{question}"
TRACK = (
    "Some variables are assigned in the following text, by a number or by another variable. Remember the "
    "assignments.\n\n{text}\n\n{question}"
)
_VALUES = re.compile(r"(?<!\d)\d{7}(?!\d)")
_VARIABLES = re.compile(r"\b[A-Z]{5}\b")


def ruler_niah(
    source: Path | None,
    limit: int | None,
    tokenizer: Any = None,
    *,
    length: int = 4096,
    needles: int = 1,
    asked: int = 1,
    seed: int = 0,
) -> Task:
    """Generate texts that hide numbers of seven digits, each under a key of its own.

    Args:
        tokenizer: required.
        length: most tokens of a prompt.
        needles: how many numbers are hidden; numbers that are not asked for are distractors.
        asked: how many of the numbers the question is about.
        seed: decides all texts, see above.

    Raises:
        ValueError: an argument is missing or out of range, or `length` is too short for the question.
    """
    if not 1 <= asked <= needles:
        raise ValueError(f"found asked {asked}, needles {needles}; expected 1 <= asked <= needles")

    def make(rng: random.Random) -> tuple[list[str], str, str, list[str]]:
        names = keys(rng, needles)
        values = [str(value) for value in rng.sample(range(1_000_000, 10_000_000), needles)]
        hidden = [
            f"The secret number of {name} is {value}." for name, value in zip(names, values, strict=True)
        ]
        chosen = rng.sample(range(needles), asked)
        wanted = ", ".join(names[index] for index in chosen)
        plural = "s" if asked > 1 else ""
        question = f"Which secret number{plural} did the text give for {wanted}?"
        answer = f" The secret number{plural} of {wanted}:"
        return rng.sample(hidden, needles), question, answer, [values[index] for index in chosen]

    return _task("ruler_niah", source, limit, tokenizer, length, seed, FIND, make, _VALUES)


def ruler_vt(
    source: Path | None,
    limit: int | None,
    tokenizer: Any = None,
    *,
    length: int = 4096,
    chains: int = 1,
    hops: int = 4,
    seed: int = 0,
) -> Task:
    """Generate assignments of variables to variables; all `hops` + 1 names that hold a number are asked for.

    Args:
        tokenizer: required.
        length: most tokens of a prompt.
        chains: number of chains of assignments; all chains but one are distractors.
        hops: number of assignments from variable to variable in each chain.
        seed: decides all texts, see above.

    Raises:
        ValueError: an argument is missing or out of range, or `length` is too short for the question.
    """
    if chains < 1 or hops < 1:
        raise ValueError(f"found chains {chains}, hops {hops}; expected at least 1 of each")

    def make(rng: random.Random) -> tuple[list[str], str, str, list[str]]:
        names: list[str] = []
        while len(names) < chains * (hops + 1):
            name = "".join(rng.choice(ascii_uppercase) for _ in range(5))
            if name not in names:
                names.append(name)
        values = [str(value) for value in rng.sample(range(10_000, 100_000), chains)]
        # The assignments of each chain stay in order; the chains are shuffled into one another.
        turns = rng.sample([chain for chain in range(chains) for _ in range(hops + 1)], len(names))
        said = [0] * chains
        hidden = []
        for chain in turns:
            first = chain * (hops + 1) + said[chain]
            origin = names[first - 1] if said[chain] else values[chain]
            hidden.append(f"Set {names[first]} = {origin}.")
            said[chain] += 1
        question = f"Which variables hold the value {values[0]}? Name all of them; there are {hops + 1}."
        return hidden, question, f" The variables that hold {values[0]}:", names[: hops + 1]

    return _task("ruler_vt", source, limit, tokenizer, length, seed, TRACK, make, _VARIABLES)


def _task(
    name: str,
    source: Path | None,
    limit: int | None,
    tokenizer: Any,
    length: int,
    seed: int,
    frame: str,
    make: Callable[[random.Random], tuple[list[str], str, str, list[str]]],
    pattern: re.Pattern[str],
) -> Task:
    """Generate the problems of a task.

    Args:
        make: draws the sentences to hide, in their order; the question; the beginning of the answer, for
            prompts without a chat template; and the answers.
        pattern: matches anything that may be an answer.
    """
    if source is not None:
        raise ValueError(f"task {name}: found source {source}, expected none: its problems are generated")
    if tokenizer is None:
        raise ValueError(f"task {name}: found no tokenizer, expected one: it measures the length")
    problems = []
    for number in range(limit or PROBLEMS):
        rng = random.Random(f"{name}/{seed}/{number}")
        hidden, question, answer, gold = make(rng)
        identity = f"{name}-{length}-{seed}-{number}"
        haystack = _Haystack(identity, rng, hidden, frame, question, answer, tokenizer)
        content = haystack.content(_most_sentences(haystack.tokens, length, identity))
        problems.append(
            Problem(identity, [], gold, content)
            if isinstance(content, str)
            else Problem(identity, content, gold)
        )

    def grade(problem: Problem, texts: Sequence[str]) -> Grades:
        wanted = set(problem.gold)
        found = [frozenset(pattern.findall(text.rsplit("</think>", 1)[-1])) or None for text in texts]
        return grades_of(found, wanted.issubset, show=lambda names: ", ".join(sorted(names)))

    return Task(name, True, problems, grade)


class _Haystack:
    """Prompts of any length around the same hidden sentences."""

    def __init__(
        self,
        identity: str,
        rng: random.Random,
        hidden: list[str],
        frame: str,
        question: str,
        answer: str,
        tokenizer: Any,
    ) -> None:
        self.identity, self.rng, self.hidden = identity, rng, hidden
        self.frame, self.question, self.answer, self.tokenizer = frame, question, answer, tokenizer
        self.depths = sorted(rng.random() for _ in hidden)  # places of the sentences, as shares of the text
        self.filler: list[str] = []

    def content(self, sentences: int) -> str | list[dict[str, str]]:
        while len(self.filler) < sentences:
            self.filler.append(sentence(self.rng))
        parts: list[str] = []
        start = 0
        for depth, needle in zip(self.depths, self.hidden, strict=True):
            end = int(depth * (sentences + 1))
            parts += [*self.filler[start:end], needle]
            start = end
        text = " ".join(parts + self.filler[start:sentences])
        asked = self.frame.format(text=text, question=self.question)
        return ask(asked) if self.tokenizer.chat_template else asked + self.answer

    def tokens(self, sentences: int) -> int:
        return len(Prompt(self.identity, 0, self.content(sentences)).encode(self.tokenizer))


def _most_sentences(tokens: Callable[[int], int], length: int, identity: str) -> int:
    """Return the largest number of sentences whose prompt has at most `length` tokens.

    The search expects the tokens to grow evenly with the sentences, because a long prompt takes a while to
    encode.

    Raises:
        ValueError: the prompt has more tokens even without a sentence.
    """
    fewest = tokens(0)
    if fewest > length:
        raise ValueError(
            f"{identity}: found length {length}, expected at least the {fewest} tokens without filler"
        )
    low, low_tokens, high = 0, fewest, None
    each = 16.0  # tokens of a sentence; a first guess
    while high is None or high - low > 1:
        guess = low + max(int((length - low_tokens) / each), 1)
        if high is not None:
            guess = min(guess, high - 1)
        count = tokens(guess)
        each = max((count - fewest) / guess, 1.0)
        if count <= length:
            low, low_tokens = guess, count
        else:
            high = guess
    return low
