"""The command line of `megatron-dms plan`. Imports nothing heavy."""

import argparse
from dataclasses import fields
from pathlib import Path

from megatron_dms.command_line import (
    Parser,
    at_least_one,
    count,
    not_negative,
    positive,
    share,
    share_or_none,
    whole,
)
from megatron_dms.planning.devices import DEVICES, Assumptions
from megatron_dms.planning.job import RECIPES, RECOMPUTE
from megatron_dms.planning.models import PRESETS

_DEFAULTS = Assumptions()
ASSUMED = {
    "matmul": ("matmul-efficiency", "share of the device's FLOPs in linear layers"),
    "attention": ("attention-efficiency", "share of the device's FLOPs in attention"),
    "memory": ("memory-efficiency", "share of the bandwidth of the device's memory"),
    "network": ("network-efficiency", "share of the links' bandwidth"),
    "latency": ("latency", "seconds for each message"),
    "exposed_dp": (
        "exposed-dp",
        "share of gradient reduction and weight gathering that a step waits for, 0 to 1",
    ),
    "overhead": ("overhead-gb", "GB of a device for CUDA, NCCL, workspaces, fragments"),
    "slowdown": (
        "slowdown",
        "factor on the roofline's step time, fitted to published runs; 1 = the roofline",
    ),
}
"""Field of Assumptions -> name of its option, help text."""


def assumptions(options: argparse.Namespace) -> Assumptions:
    """Return the assumptions that the options give."""
    found = {name: getattr(options, option.replace("-", "_")) for name, (option, _) in ASSUMED.items()}
    return Assumptions(**found | {"overhead": found["overhead"] * 1e9})


def make_parser(parser: Parser) -> Parser:
    """Give the tool's parser the options of all its commands."""
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    _train(commands)
    _serve(commands)
    text = "predictions against every available measurement, with their errors"
    check = commands.add_parser("check", help=text, description=text)
    _assumed(check)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("--model", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    one.add_argument("--hf", type=Path, metavar="DIR", help="an HF folder, of which config.json is read")
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (default: h100)"
    )


def _assumed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("assumptions")
    kinds = {
        "latency": not_negative,
        "overhead": not_negative,
        "exposed_dp": share_or_none,
        "slowdown": positive,
    }
    for item in fields(Assumptions):
        option, text = ASSUMED[item.name]
        default = getattr(_DEFAULTS, item.name)
        if item.name == "overhead":
            default /= 1e9
        group.add_argument(
            f"--{option}",
            type=kinds.get(item.name, share),
            default=default,
            metavar="X",
            help=f"{text} (default: {default:g})",
        )


def _train(commands: argparse._SubParsersAction) -> None:
    text = "memory, time and best layout of a retrofit"
    parser = commands.add_parser("train", help=text, description=text)
    _model(parser)
    add = parser.add_argument
    add("--ranks", type=count, default=8, metavar="N", help="devices (default: 8)")
    add("--recipe", choices=RECIPES, default="paper",
        help="paper: all weights trained, a second model as teacher; adapter: a linear predictor alone, the "
        "frozen base is the teacher (default: paper)")  # fmt: skip
    add("--context", type=count, metavar="N", help="tokens of a sample (default: the authors', for presets)")
    add("--batch", type=count, metavar="N", help="samples of a step (default: the authors', for presets)")
    add("--cr", type=at_least_one, nargs="+", default=[4.0, 8.0], metavar="X",
        help="compression ratios to give hours for (default: 4 8)")  # fmt: skip
    add(
        "--steps-per-cr",
        type=positive,
        default=100.0,
        metavar="X",
        help="as --dms-steps-per-cr (default: 100)",
    )
    add("--zeroing-steps", type=whole, default=0, metavar="N", help="as --dms-zeroing-steps (default: 0)")
    add("--price", type=positive, metavar="USD",
        help="price of one device for one hour; without it no cost is given")  # fmt: skip
    add("--fuse-output-layer", action="store_true", help="as --dms-fuse-output-layer")
    add("--distributed-optimizer", action=argparse.BooleanOptionalAction, default=True,
        help="optimizer state divided over data-parallel ranks, as --use-distributed-optimizer")  # fmt: skip
    add("--logits", choices=("bf16", "fp32"), default="bf16", help="type of the logits (default: bf16)")
    add("--memory", type=positive, metavar="GB", help="10^9 bytes of a device (default: the device's)")
    add("--show", type=count, default=5, metavar="N", help="layouts to print (default: 5)")
    fixed = parser.add_argument_group("a layout, or parts of one, instead of the best layout")
    for name in ("tp", "pp", "cp", "dp"):
        fixed.add_argument(f"--{name}", type=count, metavar="N", help=f"{name.upper()} size")
    fixed.add_argument("--micro-batch", dest="micro", type=count, metavar="N", help="samples of a microbatch")
    fixed.add_argument("--recompute", choices=RECOMPUTE)
    fixed.add_argument("--sp", action=argparse.BooleanOptionalAction, help="sequence parallelism")
    _assumed(parser)


def _serve(commands: argparse._SubParsersAction) -> None:
    text = "which W-L-CR (chains, tokens, compression ratio) fit into a given memory and time"
    parser = commands.add_parser("serve", help=text, description=text)
    _model(parser)
    add = parser.add_argument
    add(
        "--milliseconds",
        type=positive,
        required=True,
        metavar="X",
        help="milliseconds of the longest decode step, for all chains",
    )
    add("--memory", type=positive, metavar="GB", help="10^9 bytes of a device (default: the device's)")
    add("--cr", type=at_least_one, nargs="+", default=[1.0, 4.0, 8.0], metavar="X",
        help="compression ratios; 1 is a dense cache (default: 1 4 8)")  # fmt: skip
    add("--chains", type=count, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="N",
        help="W, chains at once (default: 1 2 4 8 16 32 64)")  # fmt: skip
    add("--window", type=whole, default=256, metavar="N", help="as --dms-window, in tokens (default: 256)")
    add("--tp", type=count, default=1, metavar="N", help="devices that share the model (default: 1)")
    add("--fixed-milliseconds", type=not_negative, default=0.0, metavar="X",
        help="milliseconds a step takes beside reading and computing, for launches (default: 0)")  # fmt: skip
    _assumed(parser)
