"""Train the tiny reasoner's base model, a Qwen3 of under a million parameters, on two CPU cores.

Every step has new problems. Each row of a batch holds one document from position 0 on, padded on the right,
and the loss is taken on the assistant's tokens or on all tokens. Programs grow from a few lines to full
length over the first part of the run: on short programs the model learns how to look values up, and later it
extends this to longer ones.

Run: python examples/tiny_reasoner/train_base.py --out out/base
The commands that made the committed model are in base/README.md.
"""

import argparse
import dataclasses
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from answers import standard_error
from make_tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer
from measure import greedy_accuracy, heldout_problems
from problems import Difficulty, add_difficulty_flags, difficulty_of, generate
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

IGNORED = -100  # the label that cross entropy leaves out
SHORTEST = 4  # lines of the curriculum's first programs
BETAS = (0.9, 0.98)
CLIP = 1.0  # largest gradient norm
FINAL_LR_SHARE = 0.02  # of the peak learning rate, at the last step
SECONDS_PER_MINUTE = 60.0
# Held-out problems watched during training; the final measurement uses others.
WATCH_SEED = 2000


def model_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """Return the architecture: GQA with two KV heads and four layers, which TP 2 and PP 2 divide evenly."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.04,  # Qwen's 0.02 is meant for widths of thousands
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def curriculum(step: int, growing_steps: int, full: Difficulty) -> Difficulty:
    """Return the difficulty at a step: program length grows linearly to the range of `full` and stays
    there."""
    if step >= growing_steps:
        return full
    longest = SHORTEST + round((full.max_lines - SHORTEST) * step / growing_steps)
    return dataclasses.replace(full, min_lines=SHORTEST, max_lines=longest)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate: a linear warm-up, then a cosine down to a small share of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return args.lr * (FINAL_LR_SHARE + (1.0 - FINAL_LR_SHARE) * cosine)


def encode(
    tokenizer: PreTrainedTokenizerBase, problem: dict[str, Any], prompt_too: bool = False
) -> tuple[list[int], list[int]]:
    """Return (token ids, labels) of a problem; without `prompt_too`, the prompt gets no labels."""
    messages = problem["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(whole)["input_ids"]
    if prompt_too:
        return ids, ids
    said_from = len(tokenizer(prompt)["input_ids"])
    return ids, [IGNORED] * said_from + ids[said_from:]


def batches(
    tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels) without end: [rows, tokens] each, with about `args.tokens` tokens."""
    step = 0
    while True:
        difficulty = curriculum(step, args.growing_steps, difficulty_of(args))
        # Each step has a seed of its own, so no step repeats the problems of another step.
        problems = generate("train", args.seed * args.steps + step, difficulty)
        rows: list[tuple[list[int], list[int]]] = []
        longest = 0
        while (len(rows) + 1) * longest <= args.tokens:
            rows.append(encode(tokenizer, next(problems), args.loss == "all"))
            longest = max(longest, len(rows[-1][0]))
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (row_ids, row_labels) in enumerate(rows):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            labels[row, : len(row_labels)] = torch.tensor(row_labels)
        yield ids, labels
        step += 1


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write checkpoint and tokenizer beside the target, then move the files in one by one."""
    unfinished = out.with_name(out.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    save_tokenizer(tokenizer, unfinished)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(unfinished.iterdir()):
        path.replace(out / path.name)  # other files in the folder, such as the model card, stay
    unfinished.rmdir()


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, save at every measurement, and return the summary."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    if args.init is None:
        model = Qwen3ForCausalLM(model_config(tokenizer))
    else:
        model = Qwen3ForCausalLM.from_pretrained(args.init)
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=BETAS, weight_decay=args.weight_decay)
    full = difficulty_of(args)
    watched = heldout_problems(args.watch, WATCH_SEED, full)
    save(model, tokenizer, args.out)
    started = time.monotonic()
    print(f"{model.num_parameters()} parameters, {args.steps} steps of {args.tokens} tokens", flush=True)

    done, loss_sum = 0, 0.0
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer, args), args.steps)):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        # Rows are padded on the right, so the causal mask alone hides padding from every real token.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.compute == "bfloat16"):
            logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        loss_sum += loss.item()
        done = step + 1
        if done % args.log_every == 0:
            seconds = time.monotonic() - started
            left = seconds / done * (args.steps - done) / SECONDS_PER_MINUTE
            print(
                f"step {done}/{args.steps} loss {loss_sum / args.log_every:.4f} tokens [{ids.shape[0]}, "
                f"{ids.shape[1]}] {seconds / done:.2f} s/step, {left:.1f} min left",
                flush=True,
            )
            loss_sum = 0.0
        if done == args.stop_after:
            break
        if done % args.measure_every == 0:
            save(model, tokenizer, args.out)
            accuracy = greedy_accuracy(model, tokenizer, watched)
            print(f"step {done}/{args.steps} accuracy {accuracy:.3f} of {args.watch} held out", flush=True)

    save(model, tokenizer, args.out)
    minutes = (time.monotonic() - started) / SECONDS_PER_MINUTE
    accuracy = greedy_accuracy(model, tokenizer, heldout_problems(args.count, difficulty=full))
    return {
        "out": str(args.out),
        "parameters": model.num_parameters(),
        "steps": done,
        "seed": args.seed,
        "minutes": round(minutes, 1),
        "accuracy": round(accuracy, 4),
        "standard_error": round(standard_error(accuracy, args.count), 4),
        "problems": args.count,
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Train the tiny reasoner's base model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and tokenizer")
    parser.add_argument("--init", type=Path, help="checkpoint to start from; without it, weights are random")
    parser.add_argument("--stop-after", type=int, help="stop after this step, leaving the schedule as it is")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of the schedule")
    parser.add_argument("--tokens", type=int, default=12288, help="tokens per step, padding included")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--growing-steps", type=int, default=1500, help="steps of growing length; 0 = none")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's weight decay")
    parser.add_argument(
        "--loss", choices=("assistant", "all"), default="assistant", help="tokens that the loss is taken on"
    )
    parser.add_argument(
        "--compute",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the matrix products; bfloat16 is twice as fast if the CPU has AVX512-BF16",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and problems")
    parser.add_argument("--log-every", type=int, default=50, help="steps between two lines of progress")
    parser.add_argument("--measure-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--watch", type=int, default=64, help="held-out problems solved at each checkpoint")
    parser.add_argument("--count", type=int, default=500, help="held-out problems of the final measurement")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    add_difficulty_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train the model and end with one JSON line."""
    args = parse_arguments(argv)
    positive = ("steps", "tokens", "log_every", "measure_every", "watch", "count", "threads")
    wrong = [name for name in positive if getattr(args, name) < 1]
    if wrong:
        print(f"train_base.py: {', '.join(wrong)} must be 1 or more", file=sys.stderr)
        return 2
    if args.init is not None and not (args.init / "config.json").is_file():
        print(f"train_base.py: --init {args.init}: no config.json in this folder", file=sys.stderr)
        return 2
    try:
        difficulty_of(args)
    except ValueError as error:
        print(f"train_base.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(train(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
