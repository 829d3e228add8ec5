"""The command line of `megatron-dms bench`: its commands and their options. Imports nothing heavy."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dms.command_line import Parser, at_least_one, count, positive, whole


class Option(NamedTuple):
    """An option whose default depends on the device."""

    name: str
    kind: Callable[[str], Any]
    cpu: Any
    """Default without a GPU; if it is a list, the option takes several values."""
    cuda: Any
    """Default with a GPU."""
    help: str


REPEATS = Option("repeats", count, 5, 20, "rounds in which the candidates take turns")
DTYPE = Option("dtype", str, "float32", "bfloat16", "float32, bfloat16 or (attention) float16")
WINDOW = Option("window", whole, 64, 512, "window of DMS in tokens")
SHAPE = [
    Option("batch", count, 1, 1, "samples"),
    Option("heads", count, 8, 32, "query heads"),
    Option("groups", count, 2, 8, "KV heads"),
    Option("head-size", count, 64, 128, "channels of a head"),
    WINDOW,
    Option(
        "cr", at_least_one, [1.0, 4.0], [1.0, 4.0, 8.0], "compression ratios at which decisions are drawn"
    ),
]
ATTENTION = [
    *SHAPE,
    Option("contexts", count, [512], [4096, 8192, 32768], "context lengths in tokens"),
    Option(
        "backends",
        str,
        ["dense", "flash", "flex"],
        ["dense", "flash", "flex", "triton"],
        "back-ends of DMS attention; without a GPU, flex has no backward and triton needs TRITON_INTERPRET=1",
    ),
    DTYPE,
    REPEATS,
]
LOSS = [
    Option("tokens", count, 256, 8192, "rows of logits"),
    Option("columns", count, 151936, 151936, "size of the vocabulary"),
    Option("hidden", count, 64, 4096, "hidden size for the losses with output projection"),
    Option("steps", whole, 0, 200, "also run each loss this often and report growth of memory; 0: do not"),
    DTYPE,
    REPEATS,
]
STEP = [
    Option("model", str, "tiny", "llama-3.2-1b", "tiny or llama-3.2-1b"),
    Option("contexts", count, [512], [4096], "context lengths in tokens"),
    Option("batch", count, 1, 1, "samples of a step"),
    Option("cr", at_least_one, 8.0, 8.0, "compression ratio of the decisions"),
    WINDOW,
    Option("backends", str, ["dense", "flash"], ["triton", "flash", "flex"], "back-ends of DMS attention"),
    DTYPE,
    REPEATS,
]
SERVE = [
    Option("shape", str, "tiny", "llama-3.2-1b", "llama-3.2-1b, qwen3-0.6b or tiny"),
    Option("contexts", count, [1024, 4096], [4096, 8192, 16384, 32768, 65536], "context lengths in tokens"),
    Option("batches", count, [1, 4], [1, 8, 32], "sequences of a step, for latency and bytes of a sequence"),
    Option("cr", at_least_one, [8.0], [4.0, 8.0], "compression ratios of the DMS caches"),
    Option("max-batch", count, 16, None, "the most sequences at which throughput is measured"),
    DTYPE,
    REPEATS,
]


def make_parser(parser: Parser) -> Parser:
    """Give the tool's parser the options of all commands.

    A default that depends on the device is None until the device is known.
    """
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    text = "cp, import and export of a synthetic Llama checkpoint; needs 3 times its size on the disk"
    convert = commands.add_parser("convert", help=text, description=text)
    convert.add_argument(
        "--gigabytes",
        type=positive,
        default=4.0,
        metavar="N",
        help="least size of the checkpoint in 10^9 bytes (default: 4; one layer: 2.5)",
    )
    convert.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="existing folder on the disk to measure; nothing is left there (default: %(default)s)",
    )
    convert.add_argument(
        "--repeats", type=count, default=3, metavar="N", help="rounds, whose median counts (default: 3)"
    )
    text = "decode with the paged DMS cache and DynamicCache: random weights, decisions forced to a ratio"
    decode = commands.add_parser("decode", help=text, description=text)
    decode.add_argument(
        "--shape", default="qwen3-0.6b", help="llama-3.2-1b, qwen3-0.6b or tiny (default: %(default)s)"
    )
    decode.add_argument(
        "--contexts",
        type=count,
        nargs="+",
        default=[4096, 32768],
        metavar="N",
        help="context lengths in tokens (default: 4096 32768)",
    )
    decode.add_argument("--batch", type=count, default=1, metavar="N", help="sequences (default: 1)")
    decode.add_argument(
        "--cr", type=at_least_one, default=8.0, metavar="X", help="compression ratio (default: 8)"
    )
    decode.add_argument(
        "--steps",
        type=count,
        default=9,
        metavar="N",
        help="tokens to decode; the median of their times counts (default: 9)",
    )
    decode.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)"
    )
    text = "decode steps by context and batch, the largest batch in a budget, and its throughput"
    serve = commands.add_parser("serve", help=text, description=text)
    _add(serve, SERVE)
    serve.add_argument(
        "--memory",
        type=positive,
        metavar="GB",
        help="10^9 bytes for weights, caches and a step (default: the GPU's free memory; else required)",
    )
    serve.add_argument("--figure", type=Path, metavar="FILE", help="also draw both as PNG, PDF or SVG")
    text = "DMS attention by back-end, context and compression ratio: forward, and forward + backward"
    attention = commands.add_parser("attention", help=text, description=text)
    _add(attention, ATTENTION)
    attention.add_argument(
        "--decisions",
        type=Path,
        metavar="DIR",
        help="exported DMS checkpoint whose decisions over --text replace drawn ones; heads and window are "
        "those of the checkpoint, times are means over its layers (runs the code of that folder)",
    )
    attention.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text at least as long as the longest context"
    )
    text = "KL(teacher || student) with gradient, from logits and with the output projection"
    _add(commands.add_parser("loss", help=text, description=text), LOSS)
    text = "a training step in one process: teacher, student, losses, backward and optimizer"
    step = commands.add_parser("step", help=text, description=text)
    _add(step, STEP)
    step.add_argument(
        "--fuse-output-layer",
        action="store_true",
        help="fuse the output layer in all rows, as --dms-fuse-output-layer does in training",
    )
    return parser


def _add(parser: argparse.ArgumentParser, options: Sequence[Option]) -> None:
    for option in options:
        several = isinstance(option.cpu, list)
        cpu, cuda = (" ".join(map(str, value)) if several else value for value in (option.cpu, option.cuda))
        default = cpu if cpu == cuda else f"{cpu}, with CUDA {'none' if cuda is None else cuda}"
        parser.add_argument(
            f"--{option.name}",
            type=option.kind,
            nargs="+" if several else None,
            metavar="NAME" if option.kind is str else "N",
            help=f"{option.help} (default: {default})",
        )
