#!/usr/bin/env python
"""Measure, on this machine.

    tools/bench.py convert     both conversions against cp: seconds, GB/s, ratio, peak memory
    tools/bench.py decode      a decode step of an exported model against transformers' dense cache

Progress goes to stderr; stdout gets a table, and JSON on the last line. Bad input: one line `error: ...` on
stderr, exit status 2; interrupted: 130.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from megatron_dms.command_line import Parser, say, say_error  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    text = "a synthetic Llama checkpoint through cp, import and export; needs 3 times its size on the disk"
    convert = commands.add_parser("convert", help=text, description=text)
    convert.add_argument(
        "--gigabytes",
        type=float,
        default=4.0,
        metavar="N",
        help="least size of the checkpoint in 10^9 bytes (default: 4; one layer of 8B's shapes has 2.5)",
    )
    convert.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="existing folder on the disk to measure; cleaned up (default: %(default)s)",
    )
    convert.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="rounds, of which the median counts (default: 3)"
    )
    text = "decode with the paged DMS cache against DynamicCache: random weights, decisions forced to a ratio"
    decode = commands.add_parser("decode", help=text, description=text)
    decode.add_argument(
        "--shape", default="qwen3-0.6b", help="llama-3.2-1b, qwen3-0.6b or tiny (default: %(default)s)"
    )
    decode.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[4096, 32768],
        metavar="N",
        help="in tokens (default: 4096 32768)",
    )
    decode.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    decode.add_argument("--cr", type=float, default=8.0, metavar="X", help="compression ratio (default: 8)")
    decode.add_argument(
        "--steps",
        type=int,
        default=9,
        metavar="N",
        help="tokens, of whose times the median counts (default: 9)",
    )
    decode.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)"
    )
    return parser


def _decode(options: argparse.Namespace) -> None:
    import torch

    from megatron_dms.hf.decode_benchmark import measure

    dtype = getattr(torch, options.dtype)
    rows = measure(options.shape, options.contexts, options.batch, options.cr, options.steps, dtype, say)
    print(
        f"{options.shape}, {options.dtype}, batch {options.batch}, CR {options.cr:g}; {options.steps} steps"
    )
    print("context  dense ms  DMS ms  times  allowed  of it  attention  live GB  allocated/live  /dense")
    for row in rows:
        print(
            f"{row.context:7}{1e3 * row.dense_step:10.1f}{1e3 * row.dms_step:8.1f}{row.speedup:7.2f}"
            f"{row.allowed_speedup:9.2f}{row.speedup / row.allowed_speedup:7.2f}{row.attention_speedup:11.2f}"
            f"{row.live_bytes / 1e9:9.3f}{row.allocated_bytes / row.live_bytes:16.3f}"
            f"{row.allocated_bytes / row.dense_bytes:8.3f}"
        )
    print(json.dumps({"shape": options.shape, "dtype": options.dtype, "rows": [asdict(row) for row in rows]}))


def _convert(options: argparse.Namespace) -> None:
    from megatron_dms.checkpoint import benchmark  # late: --help needs no torch

    size, found = benchmark.run(options.folder, options.gigabytes, options.repeats, say)
    print(f"{size / 1e9:.2f} GB, medians of {options.repeats}; start: Python, torch, and its own imports")
    print(f"{'':14}{'seconds':>9}{'GB/s':>7}{'x cp':>7}{'start s':>9}{'peak MB':>9}{'allowed MB':>12}")
    for step, row in found.items():
        line = f"{step:14}{row.seconds:9.2f}{size / row.seconds / 1e9:7.2f}{row.ratio_to_cp:7.2f}"
        if row.peak_bytes:
            line += f"{row.start_seconds:9.2f}{row.peak_bytes / 1e6:9.0f}{row.allowed_bytes / 1e6:12.0f}"
        print(line)
    rows = {step: {**asdict(row), "gb_per_second": size / row.seconds / 1e9} for step, row in found.items()}
    print(json.dumps({"bytes": size, **rows}))


def main() -> int:
    """Run one command; the return value is the exit status."""
    options = _parser().parse_args()
    try:
        {"convert": _convert, "decode": _decode}[options.command](options)
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        return say_error(error)
    except KeyboardInterrupt:
        say("interrupted; nothing was left behind")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
