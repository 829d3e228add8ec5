#!/usr/bin/env python
"""Convert checkpoints between Hugging Face's format and Megatron's (torch_dist), and check that they agree.

    tools/convert.py import --hf DIR --megatron DIR     HF -> Megatron; loads at any TP x PP
    tools/convert.py export --hf DIR --megatron DIR     Megatron -> HF
    tools/convert.py verify --hf DIR --megatron DIR     tensors bit for bit, logits within 1e-4

The last line on stdout is JSON. Bad input: one line `error: ...` on stderr, exit status 2. verify: 1 if
they differ.
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from megatron_dms.checkpoint import CheckpointError, Report, export_hf, import_hf  # noqa: E402

_SECONDS_BETWEEN_LINES = 2.0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


class _Progress:
    """A line on stderr now and then; none for a conversion that is over at once."""

    def __init__(self) -> None:
        self.last: float | None = None

    def __call__(self, done: int, total: int, size: int) -> None:
        now = time.monotonic()
        self.last = self.last or now
        if now - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = now
            print(f"{done} of {total} tensors, {size / 1e9:.2f} GB", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
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
                help="replace the output if it exists, after success (default: refuse)",
            )
        if name != "import":
            command.add_argument(
                "--iteration",
                type=int,
                metavar="N",
                help="checkpoint to read (default: the latest one finished)",
            )
        if name == "export":
            command.add_argument(
                "--hf-source",
                type=Path,
                metavar="DIR",
                help="config.json, tokenizer ... (default: hf/ of --megatron)",
            )
        if name == "verify":
            command.add_argument(
                "--prompt-tokens",
                type=int,
                default=64,
                metavar="N",
                help="length of the prompts in tokens (default: 64)",
            )
    return parser


def _verify(options: argparse.Namespace) -> int:
    # on the CPU everywhere: fp32 logits do not hang on a GPU's kernels, and Megatron takes any GPU it sees
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", category=UserWarning)  # Megatron's, on what is not installed
    from megatron_dms.checkpoint.verify import LOGIT_TOLERANCE, verify  # late: imports Megatron

    verdict = verify(options.hf, options.megatron, options.iteration, options.prompt_tokens)
    equal = verdict.tensors - len(verdict.unequal)
    print(f"{'tensors equal':24} {equal} of {verdict.tensors}")
    for name in verdict.unequal[:10]:
        print(f"{'  differs':24} {name}")
    if verdict.max_abs_logit_diff is None:
        print(f"{'logits':24} not compared: a DMS model needs the plug-in, see tests/")
    else:
        print(
            f"{'largest logit difference':24} {verdict.max_abs_logit_diff:.2e} (limit {LOGIT_TOLERANCE:.0e})"
        )
        print(f"{'most likely token agrees':24} {verdict.argmax_agreement:.2%}")
    result = {
        "tensors_equal": not verdict.unequal,
        "tensors": verdict.tensors,
        "max_abs_logit_diff": verdict.max_abs_logit_diff,
        "argmax_agreement": verdict.argmax_agreement,
    }
    print(json.dumps(result))
    return 0 if verdict.passed else 1


def _convert(options: argparse.Namespace) -> Report:
    progress = _Progress()
    if options.command == "import":
        return import_hf(options.hf, options.megatron, options.force, progress)
    return export_hf(
        options.megatron, options.hf, options.iteration, options.hf_source, options.force, progress
    )


def main() -> int:
    """Run one command; the return value is the exit status."""
    options = _parser().parse_args()
    try:
        if options.command == "verify":
            return _verify(options)
        report = _convert(options)
    except (CheckpointError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps({"bytes": report.bytes, "tensors": report.tensors, "seconds": round(report.seconds, 3)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
