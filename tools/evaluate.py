#!/usr/bin/env python
"""Evaluate exported DMS checkpoints.

    tools/evaluate.py cost --model DIR --prompts FILE     achieved CR, KV reads, peak pairs and bytes

A checkpoint's own Python files are run, as with trust_remote_code=True: evaluate only those that you trust.
Nothing is fetched. Progress goes to stderr; stdout gets a table, and JSON on the last line. Bad input: one
line `error: ...` on stderr, exit status 2; interrupted: 130.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from megatron_dms.command_line import Parser, say, say_error  # noqa: E402
from megatron_dms.evaluation.exported import (  # noqa: E402
    DTYPES,
    PAGE_ATTENTION,
    check_device,
    check_exported,
    load_model,
    load_tokenizer,
)
from megatron_dms.evaluation.output_file import output_file  # noqa: E402
from megatron_dms.evaluation.prompts import read_prompts  # noqa: E402

_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "seed": 0}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 2^63 - 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def _share(text: str) -> float:
    if (value := _positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    text = "what generating with an exported checkpoint costs; runs the Python files of the checkpoint"
    cost = commands.add_parser("cost", help=text, description=text)
    add = cost.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported DMS checkpoint")
    text = 'JSONL, each line {"prompt": TEXT} or {"messages": [...]}, a chat for the tokenizer\'s template'
    add("--prompts", type=Path, required=True, metavar="FILE", help=text)
    text = "most tokens to generate for each (default: %(default)s)"
    add("--max-new-tokens", type=_count, default=256, metavar="N", help=text)
    text = "answers to each prompt: 1 greedy, or several sampled (default: 1)"
    add("--chains", type=_count, default=1, metavar="W", help=text)
    add("--temperature", type=_positive, metavar="X", help="of sampling (default: 1)")
    add("--top-p", type=_share, metavar="X", help="of sampling, above 0, at most 1 (default: 1)")
    add("--seed", type=_seed, metavar="N", help="of sampling (default: 0)")
    text = "prompts at a time; CR and bytes of single prompts are known at 1 only (default: 1)"
    add("--batch-size", type=_count, default=1, metavar="N", help=text)
    add("--per-head", action="store_true", help="also tables of layers and KV heads")
    text = "new file for the figures of prompts and heads, too (default: none)"
    add("--json", type=Path, metavar="FILE", help=text)
    text = "of weights and cache (default: auto, what config.json names)"
    add("--dtype", choices=DTYPES, default="auto", help=text)
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    text = "how a step reads the cache; triton needs a GPU (default: %(default)s)"
    add("--page-attention", choices=PAGE_ATTENTION, default="torch", help=text)
    return parser


def _cost(options: argparse.Namespace) -> None:
    sampling = {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}
    if sampling and options.chains == 1:
        flag = next(iter(sampling)).replace("_", "-")
        raise ValueError(f"--{flag} has no effect on one chain, which is greedy; give --chains above 1")
    check_exported(options.model)
    with output_file(options.json) as write:
        prompts = read_prompts(options.prompts)
        device = check_device(options.device, options.page_attention)
        tokenizer = load_tokenizer(options.model)
        encoded = [(prompt.line, prompt.encode(tokenizer)) for prompt in prompts]
        say(f"loading {options.model} and running its code, on {device}")
        model = load_model(options.model, options.dtype, device, options.page_attention)

        from megatron_dms.evaluation import cost  # late: --help needs no torch
        from megatron_dms.evaluation.cost_table import cost_table, head_tables

        counts = {name: getattr(options, name) for name in ("max_new_tokens", "chains", "batch_size")}
        generation = cost.Generation(**counts, **_SAMPLING | sampling)
        needed = cost.PER_HEAD if options.per_head else ()
        batches = cost.measure(model, encoded, generation, tokenizer.pad_token_id or 0, say, needed)
        rows = cost.rows_as_json(batches)
        settings = {
            "model": str(options.model),
            "eviction": not model.dms_settings.disable_eviction,
            **counts,
            **(_SAMPLING | sampling if options.chains > 1 else {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device,
            "page_attention": options.page_attention,
        }
        result = settings | cost.totals(batches)
        heads = {"per_head": cost.per_head(batches)} if options.per_head else {}
        write(json.dumps({**result, "rows": rows, **heads}, indent=1, allow_nan=False) + "\n")
    if not settings["eviction"]:
        print("eviction is switched off (dms_disable_eviction): every pair is kept, CR 1")
    print(cost_table(rows, result))
    print("reads and pairs: means over layers and KV heads; all: sums, and of the peaks the largest")
    if heads:
        print(f"\n{head_tables(heads['per_head'])}\n")
    print(json.dumps(result, allow_nan=False))


def main() -> int:
    """Run one command; the return value is the exit status."""
    options = _parser().parse_args()
    try:
        {"cost": _cost}[options.command](options)
    except (ValueError, OSError) as error:
        return say_error(error)
    except KeyboardInterrupt:
        say("interrupted; nothing was left behind")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
