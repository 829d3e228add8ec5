#!/usr/bin/env python
"""Measure, on this machine.

    tools/bench.py convert     both conversions against cp: seconds, GB/s, ratio, peak memory

Progress goes to stderr; stdout gets a table, and JSON on the last line. Bad input: one line `error: ...` on
stderr, exit status 2; interrupted: 130.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        _say(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
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
    return parser


def _convert(options: argparse.Namespace) -> None:
    from megatron_dms.checkpoint import benchmark  # late: --help needs no torch

    size, found = benchmark.run(options.folder, options.gigabytes, options.repeats, _say)
    print(f"{size / 1e9:.2f} GB, medians of {options.repeats}; start: Python, torch, and its own imports")
    print(f"{'':14}{'seconds':>9}{'GB/s':>7}{'x cp':>7}{'start s':>9}{'peak MB':>9}{'allowed MB':>12}")
    for step, row in found.items():
        line = f"{step:14}{row.seconds:9.2f}{size / row.seconds / 1e9:7.2f}{row.ratio_to_cp:7.2f}"
        if row.peak_bytes:
            line += f"{row.start_seconds:9.2f}{row.peak_bytes / 1e6:9.0f}{row.allowed_bytes / 1e6:12.0f}"
        print(line)
    rows = {step: {**asdict(row), "gb_per_second": size / row.seconds / 1e9} for step, row in found.items()}
    print(json.dumps({"bytes": size, **rows}))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Run one command; the return value is the exit status."""
    options = _parser().parse_args()
    try:
        _convert(options)
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        _say(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted; nothing was left behind")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
