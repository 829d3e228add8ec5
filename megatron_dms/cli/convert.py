"""Convert checkpoints between Hugging Face's format and Megatron's (torch_dist), and check that they agree.

    megatron-dms convert import --hf DIR --megatron DIR     HF -> Megatron; loads at any TP x PP
    megatron-dms convert export --hf DIR --megatron DIR     Megatron -> HF
    megatron-dms convert verify --hf DIR --megatron DIR     tensors bit for bit, logits within 1e-4

The last line on stdout is JSON. Bad input: one line `error: ...` on stderr, exit status 2; interrupted: 130.
verify: 1 if the two differ.
"""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dms.command_line import Parser, count, exit_status, say, tool_parser
from megatron_dms.conversion_options import CARD, FORMATS, LAYOUT_SIZES
from megatron_dms.files import leftovers

if TYPE_CHECKING:
    from megatron_dms.conversion import Report

PROGRAM = "megatron-dms convert"

_SECONDS_BETWEEN_LINES = 2.0


class _Progress:
    """Prints a line on stderr every few seconds, and none for a short conversion."""

    def __init__(self) -> None:
        self.begin = self.last = time.monotonic()

    def __call__(self, done: int, total: int, size: int, total_size: int) -> None:
        now = time.monotonic()
        if now - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = now
            rate = size / (now - self.begin)
            say(
                f"{done} of {total} tensors, {size / 1e9:.1f} of {total_size / 1e9:.1f} GB, "
                f"{rate / 1e9:.2f} GB/s, {(total_size - size) / rate:.0f} s left"
            )


def _parser(program: str) -> Parser:
    parser = tool_parser(__doc__, PROGRAM, program)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, text in {
        "import": "HF checkpoint -> Megatron checkpoint",
        "export": "Megatron checkpoint -> HF checkpoint",
        "verify": "compare the two: tensors bit for bit, logits of both models in fp32",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--hf", type=Path, required=True, metavar="DIR", help="HF checkpoint folder")
        command.add_argument(
            "--megatron", type=Path, required=True, metavar="DIR", help="Megatron checkpoint folder"
        )
        if name != "verify":
            command.add_argument(
                "--force",
                action="store_true",
                help="replace an existing output once the conversion succeeds (default: refuse)",
            )
        command.add_argument(
            "--accept-config-key",
            action="append",
            default=[],
            metavar="NAME",
            help="let a key of config.json through that this project does not know and that leaves the "
            "model as it is; an import records the key for exports; may be given again (default: none)",
        )
        if name != "import":
            command.add_argument(
                "--accept-argument",
                action="append",
                default=[],
                metavar="NAME",
                help="let an argument through that Megatron stored, this project does not know and that does "
                "not change the model; may be given several times (default: none)",
            )
            command.add_argument(
                "--iteration",
                type=count,
                metavar="N",
                help="iteration of the checkpoint (default: the latest complete one)",
            )
        if name == "export":
            command.add_argument(
                "--hf-source",
                type=Path,
                metavar="DIR",
                help="folder with config.json, tokenizer and so on (default: hf/ in --megatron)",
            )
            command.add_argument(
                "--dms-format",
                choices=FORMATS,
                help="format of an exported DMS model (default: that of the import, otherwise megatron_dms)",
            )
        if name == "verify":
            command.add_argument(
                "--prompt-tokens",
                type=count,
                default=64,
                metavar="N",
                help="length of the prompts, which exceeds the window of a DMS model (default: 64)",
            )
            command.add_argument(
                "--layouts",
                nargs="+",
                choices=LAYOUT_SIZES,
                default=list(LAYOUT_SIZES),
                help="layouts of ranks in which Megatron's model runs (default: all)",
            )
            command.add_argument(
                "--card",
                type=Path,
                metavar="FILE.json",
                help=f"parity card to write, with its table as .md beside it (default: {CARD} in --megatron)",
            )
    return parser


def _verify(options: argparse.Namespace) -> int:
    from megatron_dms.conversion.parity import verify  # late: --help needs no torch

    path = options.card or options.megatron / CARD
    card = verify(
        options.hf,
        options.megatron,
        options.iteration,
        options.prompt_tokens,
        options.layouts,
        path,
        say,
        options.accept_config_key,
        options.accept_argument,
    )
    print(card.to_markdown())
    print(json.dumps({**card.summary(), "card": str(path)}))
    return 0 if card.passed else 1


def _convert(options: argparse.Namespace) -> None:
    report = _report(options)
    values = sum(report.non_finite.values())
    if values:
        tensors, first = len(report.non_finite), next(iter(report.non_finite))
        say(f"warning: {values} values in {tensors} tensors are NaN or infinite, the first in {first}")
    result = {
        "bytes": report.bytes,
        "tensors": report.tensors,
        "seconds": round(report.seconds, 3),
        "non_finite_values": values,
    }
    print(json.dumps(result))


def _report(options: argparse.Namespace) -> "Report":
    from megatron_dms.conversion import export_hf, import_hf  # late: --help needs no torch

    progress = _Progress()
    for folder in leftovers(options.megatron if options.command == "import" else options.hf):
        say(
            f"note: {folder} was left by a conversion that was killed: unfinished, or the old output that "
            "--force replaced; delete it if it is not wanted"
        )
    if options.command == "import":
        return import_hf(options.hf, options.megatron, options.force, progress, options.accept_config_key)
    return export_hf(
        options.megatron,
        options.hf,
        options.iteration,
        options.hf_source,
        options.force,
        progress,
        options.dms_format,
        options.accept_config_key,
        options.accept_argument,
    )


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command; the return value is the exit status."""
    options = _parser(program).parse_args(argv)
    command = _verify if options.command == "verify" else _convert
    return exit_status(lambda: command(options), "no output was left behind")
