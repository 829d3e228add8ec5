"""Measure speed and memory on this machine.

    megatron-dms bench convert     both conversions against cp: seconds, GB/s, ratio, peak memory
    megatron-dms bench decode      a decode step of an exported model against transformers' dense cache
    megatron-dms bench serve       decode steps by context and batch; the largest batch in a budget
    megatron-dms bench attention   each back-end of training attention against causal and FlexAttention
    megatron-dms bench loss        distillation losses against nvidia-modelopt's
    megatron-dms bench step        a training step with DMS against one without

The last four commands use the GPU if there is one, and have larger defaults there. Candidates take turns.
Times are medians with quartiles; memory is the most that a run allocates. The table says what could not be
measured.

Progress goes to stderr, a table to stdout (serve: two tables). JSON follows on the last line; the last four
commands print a line of JSON for each row. Bad input: one line `error: ...` on stderr, exit status 2;
interrupted: 130.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_dms.cli.bench_options import (
    ATTENTION,
    LOSS,
    SERVE,
    SHAPE,
    STEP,
    Option,
    make_parser,
)
from megatron_dms.command_line import exit_status, say, tool_parser
from megatron_dms.text_table import text_table

if TYPE_CHECKING:
    from megatron_dms.benchmarks.measuring import Result

PROGRAM = "megatron-dms bench"
NOT_MEASURED = "not measured"
Columns = dict[str, Callable[[Any], object]]
"""Heading of each column of a table -> what the column shows of a row."""


def _fill(options: argparse.Namespace, defaults: Sequence[Option]) -> Any:
    """Fill in the defaults of this machine's device and the torch.dtype; return the device."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for option in defaults:
        name = option.name.replace("-", "_")
        if getattr(options, name) is None:
            setattr(options, name, getattr(option, device.type))
    names = ("float32", "bfloat16") + (("float16",) if options.command == "attention" else ())
    if options.dtype not in names:
        raise ValueError(f"--dtype is {options.dtype}, expected one of {', '.join(names)}")
    options.dtype = getattr(torch, options.dtype)
    return device


def _attention(options: argparse.Namespace) -> None:
    given = [option.name for option in SHAPE if getattr(options, option.name.replace("-", "_")) is not None]
    if (options.decisions is None) != (options.text is None):
        raise ValueError("--decisions and --text go together")
    if options.decisions and given:
        raise ValueError(f"--{given[0]} with --decisions: the checkpoint has its own; drop it")
    device = _fill(options, ATTENTION)
    from megatron_dms.benchmarks.attention import Shape, drawn, measure, of_checkpoint

    if options.decisions:
        shape, found = of_checkpoint(options.decisions, options.text, options.contexts, device)
        decisions = {T: [of_context] for T, of_context in found.items()}
    else:
        shape = Shape(options.batch, options.heads, options.groups, options.head_size, options.window)
        decisions = {T: [drawn(cr, shape, T, device) for cr in options.cr] for T in options.contexts}
    rows = measure(shape, decisions, options.backends, options.dtype, options.repeats, device, say)
    B, H, G, D, window = shape
    print(
        f"{rows[0].device}; {rows[0].dtype}, batch {B}, {H} query heads, {G} KV heads, head size {D}, window "
        f"{window}; {options.repeats} rounds"
    )
    columns: Columns = {
        "context": lambda row: row.T,
        "step": lambda row: row.step,
        "attention": lambda row: row.attention,
        "CR": lambda row: "-" if row.cr is None else f"{row.cr:.2f}",
        **TIMES,
        "TFLOP/s": lambda row: _number(row.tflops, ".3g"),
        "x causal": lambda row: _number(row.to_causal, ".2f"),
        "x flex": lambda row: "-" if row.cr is None else _number(row.to_flex, ".2f"),
        **MEMORY,
    }
    _print(rows, columns)


def _loss(options: argparse.Namespace) -> None:
    device = _fill(options, LOSS)
    from megatron_dms.benchmarks.loss import measure

    sizes = (options.tokens, options.columns, options.hidden)
    rows = measure(*sizes, options.dtype, options.repeats, options.steps, device, say)
    print(
        f"{rows[0].device}; {rows[0].dtype}, {options.tokens} tokens, {options.columns} columns, hidden size "
        f"{options.hidden}; {options.repeats} rounds"
    )
    columns: Columns = {
        "loss": lambda row: row.loss,
        **TIMES,
        "x modelopt": lambda row: _number(row.to_modelopt, ".2f"),
        "peak, % of logits": lambda row: _number(row.peak_percent, ".1f"),
    }
    if options.steps:
        columns |= {
            f"MB grown in {options.steps}": lambda row: _number(row.growth_bytes, ".1f", 1e-6),
            "peak": lambda row: _number(row.peak_growth_bytes, ".1f", 1e-6),
        }
    _print(rows, columns | MEMORY)


def _step(options: argparse.Namespace) -> None:
    device = _fill(options, STEP)
    if device.type == "cpu":
        from megatron_dms.upstream import cpu

        cpu.install()
    from megatron_dms.benchmarks.step import measure

    rows = measure(
        options.model, options.contexts, options.batch, options.cr, options.window, options.backends,
        options.fuse_output_layer, options.dtype, options.repeats, device, say,
    )  # fmt: skip
    print(
        f"{rows[0].device}; {options.model}, {rows[0].dtype}, batch {options.batch}, window "
        f"{options.window}; {options.repeats} rounds"
    )
    columns: Columns = {
        "context": lambda row: row.T,
        "attention": lambda row: row.attention,
        "CR": lambda row: "-" if row.cr is None else f"{row.cr:.2f}",
        **TIMES,
        "x SDPA": lambda row: _number(row.to_sdpa, ".2f"),
        "x Megatron's": lambda row: _number(row.to_megatron, ".2f"),
        **MEMORY,
    }
    _print(rows, columns)


def _serve(options: argparse.Namespace) -> None:
    device = _fill(options, SERVE)
    from megatron_dms.benchmarks.serve import check_picture, draw, measure

    if options.figure:
        check_picture(options.figure)
    steps, largest = measure(
        options.shape, options.contexts, options.batches, options.cr, options.memory, options.max_batch,
        options.repeats, options.dtype, device, say,
    )  # fmt: skip
    first = largest[0]
    print(
        f"{first.device}; {first.shape}, {first.dtype}, weights {first.weight_bytes / 1e6:.1f} MB, budget "
        f"{first.memory_bytes / 1e9:g} GB; {options.repeats} rounds"
    )
    cache: Columns = {
        "context": lambda row: row.context,
        "cache": lambda row: "dense" if row.cr is None else f"CR {row.cr:g}",
        "batch": lambda row: _number(row.batch, "d") + " (cap)" * getattr(row, "capped", False),
        **TIMES,
    }
    note: Columns = {"": lambda row: row.note or ""}
    columns: Columns = {
        "x dense": lambda row: _number(row.to_dense, ".2f"),
        "cache MB": lambda row: _number(row.cache_bytes, ".2f", 1e-6),
        "peak MB": lambda row: _number(row.peak_bytes, ".2f", 1e-6),
    }
    _print(steps, cache | columns | note)
    columns = {
        "tokens/s": lambda row: _number(row.tokens_per_second, ".0f"),
        "x dense": lambda row: _number(row.throughput_to_dense, ".2f"),
        "MB/sequence": lambda row: _number(row.sequence_bytes, ".2f", 1e-6),
        "largest batch": lambda row: _number(row.largest_batch, "d"),
        "x dense's": lambda row: _number(row.largest_to_dense, ".2f"),
        "found by": lambda row: row.found_by or NOT_MEASURED,
    }
    _print(largest, cache | columns | note)
    if options.figure:
        draw(steps, largest, options.figure)


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return NOT_MEASURED if value is None else format(value * factor, form)


TIMES: Columns = {
    "ms": lambda row: _number(row.ms, ".2f"),
    "quartiles": lambda row: NOT_MEASURED if row.ms is None else f"{row.low_ms:.2f} {row.high_ms:.2f}",
}
MEMORY: Columns = {
    "peak MB": lambda row: _number(row.peak_bytes, ".1f", 1e-6),
    "": lambda row: row.note or "",
}


def _table(rows: Sequence[Any], columns: Columns) -> str:
    cells = [[str(cell(row)) for cell in columns.values()] for row in rows]
    last = "<" if list(columns)[-1] == "" else ">"  # a column without a heading has notes
    return text_table([list(columns), *cells], ">" * (len(columns) - 1) + last)


def _print(results: Sequence["Result"], columns: Columns) -> None:
    """Print a table, and then a line of JSON for each result."""
    print(_table(results, columns))
    for result in results:
        print(json.dumps(result.as_json()))


def _decode(options: argparse.Namespace) -> None:
    import torch

    from megatron_dms.benchmarks.decode import measure

    dtype = getattr(torch, options.dtype)
    rows = measure(options.shape, options.contexts, options.batch, options.cr, options.steps, dtype, say)
    print(
        f"{options.shape}, {options.dtype}, batch {options.batch}, CR {options.cr:g}; {options.steps} steps"
    )
    columns: Columns = {
        "context": lambda row: row.context,
        "dense ms": lambda row: f"{1e3 * row.dense_step:.1f}",
        "DMS ms": lambda row: f"{1e3 * row.dms_step:.1f}",
        "times": lambda row: f"{row.speedup:.2f}",
        "allowed": lambda row: f"{row.allowed_speedup:.2f}",
        "of it": lambda row: f"{row.speedup / row.allowed_speedup:.2f}",
        "attention": lambda row: f"{row.attention_speedup:.2f}",
        "live GB": lambda row: f"{row.live_bytes / 1e9:.3f}",
        "allocated/live": lambda row: f"{row.allocated_bytes / row.live_bytes:.3f}",
        "/dense": lambda row: f"{row.allocated_bytes / row.dense_bytes:.3f}",
    }
    print(_table(rows, columns))
    print(json.dumps({"shape": options.shape, "dtype": options.dtype, "rows": [asdict(row) for row in rows]}))


def _convert(options: argparse.Namespace) -> None:
    from megatron_dms.benchmarks import convert as benchmark  # late: --help needs no torch

    size, found = benchmark.run(options.folder, options.gigabytes, options.repeats, say)
    print(
        f"{size / 1e9:.2f} GB, medians of {options.repeats}; start: imports of Python, torch and the package"
    )
    columns: Columns = {
        "": lambda item: item[0],
        "seconds": lambda item: f"{item[1].seconds:.2f}",
        "GB/s": lambda item: f"{size / item[1].seconds / 1e9:.2f}",
        "x cp": lambda item: f"{item[1].ratio_to_cp:.2f}",
        "start s": lambda item: f"{item[1].start_seconds:.2f}" if item[1].peak_bytes else "",
        "peak MB": lambda item: f"{item[1].peak_bytes / 1e6:.0f}" if item[1].peak_bytes else "",
        "allowed MB": lambda item: f"{item[1].allowed_bytes / 1e6:.0f}" if item[1].peak_bytes else "",
    }
    print(_table(list(found.items()), columns))
    rows = {step: {**asdict(row), "gb_per_second": size / row.seconds / 1e9} for step, row in found.items()}
    print(json.dumps({"bytes": size, **rows}))


COMMANDS = {
    "convert": _convert,
    "decode": _decode,
    "serve": _serve,
    "attention": _attention,
    "loss": _loss,
    "step": _step,
}


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command; the return value is the exit status."""
    options = make_parser(tool_parser(__doc__, PROGRAM, program)).parse_args(argv)
    return exit_status(lambda: COMMANDS[options.command](options))
