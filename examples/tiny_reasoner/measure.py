"""Measure a checkpoint: greedy exact accuracy on held-out problems, generated in left-padded batches.

Run: python examples/tiny_reasoner/measure.py --model examples/tiny_reasoner/base --count 500
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from answers import exact_match, standard_error
from problems import Difficulty, add_difficulty_flags, difficulty_of, generate
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HELDOUT_SEED = 1000
# The longest chain of the default difficulty has 171 tokens; the rest is room for a rambling chain.
MAX_NEW_TOKENS = 224
BATCH = 128


def heldout_problems(count: int, seed: int = HELDOUT_SEED, difficulty: Difficulty | None = None) -> list[Any]:
    """Return the first `count` held-out problems of a seed."""
    return list(itertools.islice(generate("heldout", seed, difficulty), count))


@torch.no_grad()
def greedy_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, Any]],
    batch: int = BATCH,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Return what a transformers model says greedily to each problem, special tokens included."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(problems), batch):
        prompts = [
            tokenizer.apply_chat_template(p["messages"][:-1], tokenize=False, add_generation_prompt=True)
            for p in problems[start : start + batch]
        ]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
        ).to(model.device)
        said = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts += tokenizer.batch_decode(said[:, inputs["input_ids"].shape[1] :])
    return texts


def greedy_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, Any]],
    batch: int = BATCH,
) -> float:
    """Return the share of problems whose generated text ends in the right answer."""
    hits = exact_match(greedy_texts(model, tokenizer, problems, batch), [p["answer"] for p in problems])
    return sum(hits) / len(hits)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Greedy exact accuracy of a checkpoint on held-out problems.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--count", type=int, default=500, help="held-out problems")
    parser.add_argument("--seed", type=int, default=HELDOUT_SEED, help="seed of the held-out problems")
    parser.add_argument("--batch", type=int, default=BATCH, help="problems generated together")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    add_difficulty_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure and end with one JSON line."""
    args = parse_arguments(argv)
    if args.count < 1 or args.batch < 1:
        print("measure.py: --count and --batch must be 1 or more", file=sys.stderr)
        return 2
    try:
        problems = heldout_problems(args.count, args.seed, difficulty_of(args))
    except ValueError as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    accuracy = greedy_accuracy(model, tokenizer, problems, args.batch)
    result = {
        "model": args.model,
        "accuracy": round(accuracy, 4),
        "standard_error": round(standard_error(accuracy, args.count), 4),
        "problems": args.count,
        "seed": args.seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
