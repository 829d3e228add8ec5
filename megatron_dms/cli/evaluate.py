"""Measure what exported DMS checkpoints and training-free methods cost, and how accurate they are.

    megatron-dms evaluate cost    measure what an exported checkpoint's answers to a file of prompts cost
    megatron-dms evaluate run     compare methods at budgets W-L-CR: accuracy against cost, table, report
    megatron-dms evaluate score   grade the samples of `run` again, without a model

`run` and `score` of a code task execute the generated programs, in a sandbox.
The Python files of a DMS checkpoint are run, as with trust_remote_code=True: evaluate only checkpoints that
you trust. Nothing is downloaded, except the dataset by `run` without --data. Progress goes to stderr; stdout
gets a table, and JSON on the last line. Bad input gives one line `error: ...` on stderr and exit status 2; an
interrupted command ends with status 130.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from megatron_dms.command_line import (
    Parser,
    count,
    exit_status,
    not_negative,
    positive,
    say,
    seed,
    share,
    tool_parser,
)
from megatron_dms.evaluation.budgets import METHODS, Budget, plan
from megatron_dms.evaluation.tasks import TASKS
from megatron_dms.files import output_file
from megatron_dms.inference.checkpoints import DTYPES
from megatron_dms.inference.loading import (
    PAGE_ATTENTION,
    check_device,
    check_exported,
    load_model,
    load_tokenizer,
)
from megatron_dms.inference.prompts import read_prompts

PROGRAM = "megatron-dms evaluate"
_NO_SANDBOX = "let the generated programs of a code task run as this user, with network and files"
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "seed": 0}  # of `cost`
_RUN_SAMPLING = {"temperature": 0.6, "top_p": 0.95}


def _budget(text: str) -> Budget:
    try:
        return Budget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _checkpoint(text: str) -> tuple[float, Path]:
    ratio, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"{text} is not CR=DIR")
    return positive(ratio), Path(folder)


def _option(text: str) -> tuple[str, str | int]:
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name, int(value) if re.fullmatch(r"-?[0-9]+", value) else value


def _list_of[T](kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _parser(program: str) -> Parser:
    parser = tool_parser(__doc__, PROGRAM, program)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    text = "measure what generating with an exported checkpoint costs; its Python files are run"
    _add_cost(commands.add_parser("cost", help=text, description=text))
    text = "compare methods at budgets W-L-CR: W chains of at most L tokens at a compression ratio"
    again = "A second call goes on where the first one stopped."
    _add_run(commands.add_parser("run", help=text, description=f"{text}. {again}"))
    text = "grade the samples of `run` again, and write table, figures and report again"
    executes = "In code tasks, this executes the generated programs, in a sandbox."
    score = commands.add_parser("score", help=text, description=f"{text}. {executes}")
    score.add_argument("--out", type=Path, required=True, metavar="OUT", help="the --out folder of `run`")
    text = "where the task's data is now (default: where it was)"
    score.add_argument("--data", type=Path, metavar="PATH", help=text)
    score.add_argument("--no-sandbox", action="store_true", help=_NO_SANDBOX)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add("--task", choices=TASKS, required=True, help="see docs/tasks.md")
    add("--data", type=Path, metavar="PATH", help="the task's file or folder (default: the hub)")
    add("--limit", type=count, metavar="N", help="the first N problems (default: all)")
    text = "an option of the task, such as since=2024-08-01; may be repeated"
    add("--task-option", type=_option, action="append", default=[], metavar="NAME=VALUE", help=text)
    text = f"some of {','.join(METHODS)}: vanilla runs the budgets with CR 1, the others all other budgets"
    add("--no-sandbox", action="store_true", help=_NO_SANDBOX)
    add("--methods", type=_list_of(str), required=True, metavar="LIST", help=text)
    text = "W-L-CR,...: number of chains, most generated tokens of a chain, compression ratio"
    add("--budgets", type=_list_of(_budget), required=True, metavar="LIST", help=text)
    add("--seeds", type=_list_of(seed), default=[0], metavar="LIST", help="sampling seeds (default: 0)")
    text = "plain HF checkpoint for all methods but dms: Llama, Mistral, Qwen2 or Qwen3"
    add("--model", type=Path, metavar="DIR", help=text)
    text = "exported DMS checkpoint for the budgets with this CR; its Python files are run; may be repeated"
    add("--dms", type=_checkpoint, action="append", default=[], metavar="CR=DIR", help=text)
    text = "sampling temperature; 0 takes the likeliest token, for one chain only (default: 0.6)"
    add("--temperature", type=not_negative, metavar="X", help=text)
    add("--top-p", type=share, metavar="X", help="sampling top-p, above 0, at most 1 (default: 0.95)")
    text = "number of problems answered together, each with all its chains (default: %(default)s)"
    add("--batch-size", type=count, default=1, metavar="N", help=text)
    add("--out", type=Path, required=True, metavar="OUT", help="folder for samples and results")
    _add_device(run)


def _add_device(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    text = "dtype of weights and cache (default: auto, the dtype that config.json names)"
    add("--dtype", choices=DTYPES, default="auto", help=text)
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    text = "how a decode step of DMS or vanilla reads the cache; triton needs a GPU (default: %(default)s)"
    add("--page-attention", choices=PAGE_ATTENTION, default="torch", help=text)


def _add_cost(cost: argparse.ArgumentParser) -> None:
    add = cost.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported DMS checkpoint")
    text = 'JSONL; a line is {"prompt": TEXT}, or {"messages": [...]} for the chat template of the tokenizer'
    add("--prompts", type=Path, required=True, metavar="FILE", help=text)
    text = "most tokens to generate for each answer (default: %(default)s)"
    add("--max-new-tokens", type=count, default=256, metavar="N", help=text)
    text = "number of answers to each prompt: 1 greedy answer, or several sampled ones (default: 1)"
    add("--chains", type=count, default=1, metavar="W", help=text)
    add("--temperature", type=positive, metavar="X", help="sampling temperature (default: 1)")
    add("--top-p", type=share, metavar="X", help="sampling top-p, above 0, at most 1 (default: 1)")
    add("--seed", type=seed, metavar="N", help="sampling seed (default: 0)")
    text = "number of prompts answered together; only 1 shows the CR and bytes of each (default: 1)"
    add("--batch-size", type=count, default=1, metavar="N", help=text)
    add("--per-head", action="store_true", help="also print tables of layers and KV heads")
    text = "new file for all figures, those of each prompt and head included (default: none)"
    add("--json", type=Path, metavar="FILE", help=text)
    _add_device(cost)


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

        from megatron_dms.evaluation import generation_cost
        from megatron_dms.inference.generation import pad_id

        counts = {name: getattr(options, name) for name in ("max_new_tokens", "chains", "batch_size")}
        generation = generation_cost.Generation(**counts, **_SAMPLING | sampling)
        needed = generation_cost.PER_HEAD if options.per_head else ()
        batches = generation_cost.measure(model, encoded, generation, pad_id(tokenizer), say, needed)
        rows = generation_cost.rows_as_json(batches)
        settings = {
            "model": str(options.model),
            "eviction": not model.dms_settings.disable_eviction,
            **counts,
            **(_SAMPLING | sampling if options.chains > 1 else {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device,
            "page_attention": options.page_attention,
        }
        result = settings | generation_cost.totals(batches)
        heads = {"per_head": generation_cost.per_head(batches)} if options.per_head else {}
        write(json.dumps({**result, "rows": rows, **heads}, indent=1, allow_nan=False) + "\n")
    if not settings["eviction"]:
        print("eviction is switched off (dms_disable_eviction): every pair is kept, CR 1")
    print(generation_cost.cost_table(rows, result))
    print("reads and pairs: means over layers and KV heads; line `all`: sums, and the largest peaks")
    if heads:
        print(f"\n{generation_cost.head_tables(heads['per_head'])}\n")
    print(json.dumps(result, allow_nan=False))


def _run(options: argparse.Namespace) -> None:
    runs = plan(options.methods, options.budgets, options.seeds)
    if options.temperature == 0 and options.top_p is not None:
        raise ValueError("--top-p has no effect at --temperature 0, which takes the likeliest token")
    if options.temperature == 0 and (len(options.seeds) > 1 or any(run.budget.chains > 1 for run in runs)):
        raise ValueError("--temperature 0 takes the likeliest token: all chains and seeds would be the same")
    for name, pairs in (("--dms", options.dms), ("--task-option", options.task_option)):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"{name} is given twice for the same name")

    from megatron_dms.evaluation.evaluation_run import EvaluationRun, Models, TaskChoice, without_sandbox
    from megatron_dms.evaluation.runner import run_evaluation
    from megatron_dms.inference.generation import Sampling

    given = {name: value for name in _RUN_SAMPLING if (value := getattr(options, name)) is not None}
    task_options = dict(options.task_option)
    if options.no_sandbox:
        task_options = without_sandbox(options.task, task_options)
    asked = EvaluationRun(
        runs=runs,
        task=TaskChoice(options.task, _data(options), options.limit, task_options),
        models=Models(
            options.model, dict(options.dms), options.dtype, options.device, options.page_attention
        ),
        sampling=Sampling(**_RUN_SAMPLING | given),
        batch_size=options.batch_size,
        out=options.out,
    )
    run_evaluation(asked, say)
    _score(options)


def _data(options: argparse.Namespace) -> str | None:
    return None if options.data is None else str(options.data.resolve())


def _score(options: argparse.Namespace) -> None:
    from megatron_dms.evaluation.results import score
    from megatron_dms.evaluation.scoring import table

    results = score(options.out, _data(options), say, not options.no_sandbox)
    print(table(results.pop("table")))
    print("accuracy: majority vote (code: any chain), in % with 95 % intervals; costs: of one problem")
    print(json.dumps({"out": str(options.out), **results}, allow_nan=False))


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command and return the exit status."""
    options = _parser(program).parse_args(argv)
    command = {"cost": _cost, "run": _run, "score": _score}[options.command]
    kept = "the samples so far are kept" if options.command == "run" else "nothing was left behind"
    return exit_status(lambda: command(options), kept)
