"""Reasoning problems for the tiny reasoner: straight-line programs over digits, modulo ten.

A problem lists assignments ("c = a + b") and asks for one variable. The chain of thought walks the program
line by line and writes every name followed by its value ("c = a 7 + b 4 -> c 1"), so that each step needs
only the program line and two earlier values. Some values matter many lines later, others never again. A KV
cache that forgets has to learn this pattern.

Training and held-out problems cannot collide: the split *is* a function of the program's text (`split_of`).

Run: python examples/tiny_reasoner/problems.py --split heldout --count 500 --seed 1 --out heldout.jsonl
"""

import argparse
import hashlib
import json
import random
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = 10  # every value is one decimal digit: one token
SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 16  # one text in this many is held out
SYSTEM_PROMPT = "work out each line modulo ten , then answer ."


@dataclass(frozen=True)
class Difficulty:
    """How hard a problem is. The committed base model was trained with the defaults."""

    min_lines: int = 12
    """Fewest lines of a program (constants included)."""
    max_lines: int = 16
    """Most lines of a program; at most 26, one letter each."""
    constants: int = 3
    """Leading lines that assign a digit; all later lines combine two earlier variables."""
    operations: str = "++--*"
    """Operations to draw from, uniformly; repeat a character to give it more weight."""
    operands: int = 2
    """Variables that a line combines from left to right. Only the final value is a token of thought, so each
    further variable makes a line harder."""

    def __post_init__(self) -> None:
        letters = len(string.ascii_lowercase)
        if not 2 <= self.operands <= self.constants:
            raise ValueError(
                f"need 2 <= operands <= constants, got operands = {self.operands}, constants = "
                f"{self.constants}: a line combines that many earlier variables"
            )
        if not self.constants < self.min_lines <= self.max_lines <= letters:
            raise ValueError(
                f"need constants < min_lines <= max_lines <= {letters}, got constants = {self.constants}, "
                f"min_lines = {self.min_lines}, max_lines = {self.max_lines}"
            )
        if not self.operations or set(self.operations) - set("+-*"):
            raise ValueError(f"operations = {self.operations!r}: only the characters + - * are known")


def apply_operation(left: int, operation: str, right: int) -> int:
    """Return the value of `left operation right`, modulo ten."""
    if operation == "+":
        return (left + right) % BASE
    if operation == "-":
        return (left - right) % BASE
    if operation == "*":
        return (left * right) % BASE
    raise ValueError(f"unknown operation {operation!r}; known: + - *")


def split_of(question: str) -> str:
    """Return the split of a question. It depends on the text alone, so the two splits are disjoint."""
    digest = hashlib.sha256(question.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def draw_problem(rng: random.Random, difficulty: Difficulty) -> tuple[str, str, str]:
    """Draw a problem: (question, chain of thought, answer), all of them words separated by single spaces."""
    count = rng.randint(difficulty.min_lines, difficulty.max_lines)
    # The names are consecutive letters: the name of the next line is trivial, its content is not.
    start = rng.randrange(len(string.ascii_lowercase) - count + 1)
    names = string.ascii_lowercase[start : start + count]
    values: dict[str, int] = {}
    program: list[str] = []
    thoughts: list[str] = []
    for index, name in enumerate(names):
        if index < difficulty.constants:
            values[name] = rng.randrange(BASE)
            program.append(f"{name} = {values[name]}")
            thoughts.append(f"{name} = {values[name]} -> {name} {values[name]}")
            continue
        first, *others = rng.sample(names[:index], difficulty.operands)
        value, said, thought = values[first], first, f"{first} {values[first]}"
        for other in others:
            operation = rng.choice(difficulty.operations)
            value = apply_operation(value, operation, values[other])
            said += f" {operation} {other}"
            thought += f" {operation} {other} {values[other]}"
        values[name] = value
        program.append(f"{name} = {said}")
        thoughts.append(f"{name} = {thought} -> {name} {value}")
    # The question is about a computed variable of the second half: often not the last one, but several steps
    # deep.
    asked = names[rng.randrange(max(difficulty.constants, count // 2), count)]
    question = " ; ".join(program) + f" ; what is {asked} ?"
    chain = " ; ".join(thoughts) + f" ; so {asked} {values[asked]} ; answer {values[asked]}"
    return question, chain, str(values[asked])


def generate(split: str, seed: int, difficulty: Difficulty | None = None) -> Iterator[dict[str, Any]]:
    """Yield problems of one split without end, as a function of the arguments only.

    Args:
        split: "train" or "heldout".
        seed: any integer.
        difficulty: None for the default.

    Yields:
        {"id", "messages" (system, user, assistant), "answer"}: a line of the chat JSONL.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}, known are {SPLITS}")
    difficulty = difficulty or Difficulty()
    rng = random.Random(f"{split}/{seed}")
    number = 0
    while True:
        question, chain, answer = draw_problem(rng, difficulty)
        if split_of(question) != split:
            continue
        yield {
            "id": f"{split}-{seed}-{number}",
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": question},
                {"role": "assistant", "content": chain},
            ],
            "answer": answer,
        }
        number += 1


def add_difficulty_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how hard problems are; `difficulty_of` reads these flags."""
    default = Difficulty()
    add = parser.add_argument
    add("--min-lines", type=int, default=default.min_lines, help="fewest lines of a program")
    add("--max-lines", type=int, default=default.max_lines, help="most lines, at most 26")
    add("--constants", type=int, default=default.constants, help="leading lines, each a digit")
    add(
        "--operations",
        default=default.operations,
        help="operations to draw from; repeat one to draw it more often",
    )
    add("--operands", type=int, default=default.operands, help="variables that a line combines")


def difficulty_of(args: argparse.Namespace) -> Difficulty:
    """Return the difficulty that the flags ask for.

    Raises:
        ValueError: the flags contradict each other.
    """
    return Difficulty(args.min_lines, args.max_lines, args.constants, args.operations, args.operands)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Write reasoning problems as chat JSONL: id, messages, answer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--split", choices=SPLITS, required=True, help="which of the two disjoint sets")
    parser.add_argument("--count", type=int, required=True, help="problems to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of the generator")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    add_difficulty_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the file, complete or not at all, and end with one JSON line."""
    args = parse_arguments(argv)
    try:
        if args.count < 1:
            raise ValueError(f"--count {args.count}: give 1 or more")
        difficulty = difficulty_of(args)
        if not args.out.parent.is_dir():
            raise ValueError(f"--out {args.out}: the folder {args.out.parent} does not exist; make it first")
    except ValueError as error:
        print(f"problems.py: {error}", file=sys.stderr)
        return 2
    problems = generate(args.split, args.seed, difficulty)
    unfinished = args.out.with_name(args.out.name + ".part")
    with unfinished.open("w", encoding="utf-8") as stream:
        for _ in range(args.count):
            stream.write(json.dumps(next(problems)) + "\n")
    unfinished.replace(args.out)
    print(json.dumps({"out": str(args.out), "split": args.split, "seed": args.seed, "count": args.count}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
