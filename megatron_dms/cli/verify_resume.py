"""Kill a training run repeatedly, resume it, and compare it bit for bit with an uninterrupted run.

    megatron-dms verify-resume --out scratch/resume --steps 20 --save-interval 5 --kills 3 -- \\
        torchrun --nproc-per-node 8 pretrain_dms.py FLAGS OF YOUR RUN

The check runs on one Linux machine. It replaces --save, --load, --train-iters, --save-interval and
--tensorboard-dir of the command, and leaves the command's folders alone. The run must compute the same
twice. On CPU it does; on GPUs add --deterministic-mode and what Megatron asks for with it. The last line is
JSON. Exit status: 0 equal in every bit; 1 not equal, or a run did not resume from its newest checkpoint; 2
bad input.
"""

import json
from dataclasses import asdict
from pathlib import Path

from megatron_dms.command_line import (
    Parser,
    count,
    positive,
    say,
    seed,
    share_or_none,
    split_at_dashes,
    tool_parser,
    whole,
)

PROGRAM = "megatron-dms verify-resume"
_SHOWN = 5  # how many names of differing tensors are shown


def _parser(program: str) -> Parser:
    parser = tool_parser(__doc__, PROGRAM, program)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder for both runs and their logs"
    )
    parser.add_argument("--steps", type=count, required=True, metavar="N", help="training steps of each run")
    parser.add_argument(
        "--save-interval", type=count, required=True, metavar="N", help="steps between checkpoints"
    )
    parser.add_argument("--kills", type=whole, default=3, metavar="N", help="number of kills (default: 3)")
    parser.add_argument(
        "--while-saving",
        type=share_or_none,
        default=0.5,
        metavar="SHARE",
        help="share of kills that wait until the run saves; the others come at any time (default: 0.5)",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed that draws moments and ranks of kills (default: 0)",
    )
    parser.add_argument(
        "--timeout", type=positive, default=3600, metavar="S", help="seconds for one start (default: 3600)"
    )
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="command of the run")
    return parser


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run, kill, compare; the return value is the exit status."""
    own, command = split_at_dashes(argv)
    parser = _parser(program)
    options = parser.parse_args(own)
    if options.command or not command:
        parser.error("expected -- and the command of the run at the end")
    if options.save_interval > options.steps:
        parser.error(f"--save-interval is {options.save_interval}, more than --steps {options.steps}")
    if options.out.exists():
        parser.error(f"--out {options.out} exists; choose a new folder")
    from megatron_dms.resilience.resume_check import CheckFailed, Plan, ResumeCheck

    plan = Plan(
        command=command,
        out=options.out.absolute(),
        steps=options.steps,
        save_interval=options.save_interval,
        kills=options.kills,
        while_saving=options.while_saving,
        seed=options.seed,
        timeout=options.timeout,
    )
    check = ResumeCheck(plan)
    tensors, failure = 0, None
    different: list[str] = []
    try:
        tensors, different = check.run()
    except CheckFailed as error:
        failure = str(error)
        say(f"error: {failure}")
    equal = failure is None and tensors > 0 and not different
    if failure is None:
        verdict = f"{tensors - len(different)} of {tensors} tensors are equal in every bit"
        say(verdict + "".join(f"; {name} differs" for name in different[:_SHOWN]))
    found = asdict(check.found)
    found["resumes"] = len(found.pop("resumed"))
    print(json.dumps({"equal": equal, "tensors": tensors, "different": different[:_SHOWN], **found}))
    return 0 if equal else 1
