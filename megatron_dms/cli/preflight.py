"""Check every node before a job burns hours. launch/torchrun.sh runs this once on each node.

    megatron-dms preflight --hosts a,b --node-rank 0 --gpus-per-node 8 -- FLAGS OF pretrain_dms.py

All nodes meet at --port of the first host. The first host prints a line for each failed check (on stderr), a
table of nodes and checks, and a line of JSON. Exit status: 0 all checks passed on all nodes, 1 one failed,
2 bad input.
"""

import os

from megatron_dms.command_line import (
    Parser,
    count,
    not_negative,
    positive,
    say_error,
    split_at_dashes,
    tool_parser,
    whole,
)

PROGRAM = "megatron-dms preflight"


def _parser(program: str) -> Parser:
    parser = tool_parser(__doc__, PROGRAM, program)
    parser.add_argument("--hosts", required=True, metavar="A,B,...", help="all nodes in order of rank")
    parser.add_argument(
        "--node-rank", type=whole, default=0, metavar="R", help="rank of this node, from 0 (default: 0)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=count,
        required=True,
        metavar="G",
        help="processes on each node, one for each GPU",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device of the run (default: cuda)"
    )
    parser.add_argument(
        "--port", type=count, default=29400, metavar="P", help="port of the first host (default: 29400)"
    )
    parser.add_argument(
        "--min-free-gb",
        type=not_negative,
        default=100,
        metavar="GB",
        help="free disk space needed at --save (default: 100 GB)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=120,
        metavar="S",
        help="seconds until the nodes must have met, and for the all-reduce (default: 120)",
    )
    parser.add_argument("training", nargs="*", metavar="-- FLAGS", help="flags of pretrain_dms.py")
    return parser


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the part of this node; the return value is the exit status."""
    own, training = split_at_dashes(argv)
    parser = _parser(program)
    options = parser.parse_args(own)
    if options.training:
        parser.error(f"found {options.training[0]}, expected -- before the flags of pretrain_dms.py")
    hosts = tuple(host for host in options.hosts.split(",") if host)
    if options.node_rank >= len(hosts):
        parser.error(f"--node-rank is {options.node_rank}, expected 0 to {len(hosts) - 1}: one of --hosts")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a missing node is a line here, not a C++ trace
    from megatron_dms.launch.preflight import Preflight

    run = Preflight(
        hosts=hosts,
        node_rank=options.node_rank,
        gpus_per_node=options.gpus_per_node,
        port=options.port,
        device=options.device,
        minimum_free_gb=options.min_free_gb,
        timeout=options.timeout,
        training=tuple(training),
    )
    try:
        return run.run()
    except ValueError as error:
        return say_error(error)
