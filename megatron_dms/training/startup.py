"""From the command line to Megatron's checked arguments; all errors a user can make are found here
(checks.py).

Order: DMS flags (before Megatron is even imported), Megatron's flags, the checkpoint to start from and its
architecture, the data, the teacher. Each error is one line, before any process group exists.
"""

import argparse
import difflib
import traceback
from argparse import Namespace
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_dms.arguments import add_dms_arguments, dms_config_from_args
from megatron_dms.config import DMSConfig, flag_of
from megatron_dms.errors import StartupError
from megatron_dms.training import checks

if TYPE_CHECKING:
    from megatron_dms.training.weights import Weights


def check_dms_flags(argv: list[str]) -> DMSConfig:
    """Parse and validate the --dms-* flags alone, in milliseconds.

    Raises:
        StartupError: an unknown flag, a value of the wrong type or out of range, a contradiction.
    """
    parser = _OneLineParser(allow_abbrev=False, add_help=False)
    add_dms_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    known = [flag_of(item.name) for item in fields(DMSConfig)]
    for word in rest:
        flag = word.split("=")[0]
        if flag.startswith("--dms"):
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise StartupError(f"unknown flag {flag}; {hint}")
    try:
        return dms_config_from_args(args)
    except ValueError as error:
        raise StartupError(str(error)) from error


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartupError(message)


def parse_megatron_args(dms: DMSConfig) -> tuple[Namespace, "Weights | None", "Weights | None"]:
    """All flags, completed by the architecture of the checkpoint to start from, checked and made global.

    Returns:
        The arguments, the weights that a new retrofit starts from, and the teacher's. Those to start from are
        ours to load: Megatron's loading insists on every tensor of the model, and a base model has no linear
        predictor; None if Megatron resumes a retrofit from --load. No teacher: it is the student itself.

    Raises:
        StartupError: see the module's docstring.
    """
    from megatron.training.arguments import parse_args
    from megatron.training.global_vars import set_global_variables

    from megatron_dms.conversion import CheckpointError
    from megatron_dms.data.data_flags import validate_data_args
    from megatron_dms.errors import DataError
    from megatron_dms.training.layout import check_heads_and_layers, check_layout
    from megatron_dms.training.run_log import mirror_metrics, open_run_log
    from megatron_dms.upstream.megatron_arguments import validate

    try:
        begin: list[tuple[Weights, bool]] = []
        args = parse_args(partial(_prepare_parser, begin=begin))
        ((start, continues),) = begin
        checks.check_supported(args)
        checks.check_attention_backend(args, dms)
        checks.check_positive(args)
        checks.check_checkpoint(args, dms, start, continues)
        if not continues:
            checks.check_start(dms, start)
        validate_data_args(args)
        check_layout(args)
        checks.check_training(args, dms)
        teacher = checks.check_teacher(args, dms)
        if teacher is not None:
            check_heads_and_layers(args, teacher.args, "the teacher")
    except (CheckpointError, DataError) as error:
        raise StartupError(str(error)) from error
    args.dms = dms.to_dict()  # saved with the arguments in every checkpoint
    if not continues:
        args.pretrained_checkpoint = None
        args.load = None if args.load and Path(args.load) == start.folder else args.load
    try:
        validate(args)
        mirror = open_run_log(args, start.iteration if continues else 0)
        set_global_variables(args)
        mirror_metrics(mirror)
    except OSError as error:
        raise StartupError(f"the logs cannot be written: {error}", one_rank=True) from error
    except (AssertionError, ValueError, RuntimeError) as error:
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # many asserts say nothing
        raise StartupError(f"Megatron refuses these flags: {said}") from error
    if args.rank == 0:
        checks.warn_if_not_zeroed(dms, start)
        if args.save:
            _carry_hf_files(start, Path(args.save), continues)
    return args, None if continues else start, teacher


def _prepare_parser(
    parser: argparse.ArgumentParser, begin: list[tuple["Weights", bool]]
) -> argparse.ArgumentParser:
    """Add the DMS flags; take defaults from the checkpoint's model, this project and the CPU platform.

    begin: gets the starting point, which these defaults need, so that it is opened once.
    """
    from megatron_dms.conversion import set_parser_defaults
    from megatron_dms.upstream.megatron_arguments import set_machine_defaults

    parser.error = _raise_startup_error
    add_dms_arguments(parser)
    parser.add_argument(
        "--load-hf",
        metavar="DIR",
        help="start a retrofit from the weights of this HF folder, without a conversion before",
    )
    parser.set_defaults(attention_dropout=0.0, hidden_dropout=0.0, rerun_mode="disabled", eval_interval=100)
    parser.set_defaults(cp_comm_type=["a2a"], async_strategy="mcore")
    set_machine_defaults(parser)
    early, _ = parser.parse_known_args()
    start, continues = starting_point(early)
    begin.append((start, continues))
    set_parser_defaults(parser, start.args, start.tokenizer_folder)
    return parser


def _carry_hf_files(start: "Weights", save: Path, continues: bool) -> None:
    """Put the HF side files beside the new checkpoints, where an export looks for them.

    A new run replaces those that an earlier one of another model left, unless there are checkpoints too: its
    files and ours would be mixed up.
    """
    from megatron_dms.conversion import CheckpointError
    from megatron_dms.formats.megatron_folder import HF, TRACKER

    try:
        if (save / HF).exists() and (continues or start.has_hf_files(save)):
            return
        if (save / HF).exists() and (save / TRACKER).exists():
            raise StartupError(
                f"--save {save} holds another model's checkpoints; choose another folder, or --load it to "
                "go on"
            )
        start.carry_hf_files(save)
    except (CheckpointError, OSError) as error:
        raise StartupError(f"--save {save} cannot be written: {error}") from error


def _newest_readable(load: Path, iteration: int) -> "Weights":
    """The checkpoint of `iteration`, or the newest finished one before it that describes itself.

    One that cannot is passed over here; what becomes of it is decided when all ranks verify its bytes
    (training/checkpoints.py).
    """
    from megatron_dms.resilience.run_folder import resume_point
    from megatron_dms.training.weights import MegatronWeights

    damaged: dict[int, str] = {}
    while True:
        try:
            return MegatronWeights(load, iteration)
        except Exception as error:  # unpickling damaged bytes may raise anything
            damaged[iteration] = f"{type(error).__name__}: {error}"
        iteration, _ = resume_point(load, damaged)  # raises where none is left


def _raise_startup_error(message: str) -> NoReturn:
    raise StartupError(message)


def starting_point(args: Namespace) -> tuple["Weights", bool]:
    """What the run's weights are, and whether training goes on there (False: starts anew).

    A retrofit that was begun is resumed, whatever it started from: the same command line does both.
    """
    from megatron_dms.formats.megatron_folder import RELEASE, TRACKER
    from megatron_dms.resilience.run_folder import resume_point
    from megatron_dms.training.weights import HFWeights, MegatronWeights

    def finished(folder: str | None) -> bool:
        return bool(folder) and (Path(folder) / TRACKER).is_file()

    newest, _ = resume_point(Path(args.load)) if args.load else (None, {})
    if newest is not None:
        continues = not args.finetune and newest != RELEASE
        if continues or not args.load_hf:
            if continues and args.ckpt_step is None:
                return _newest_readable(Path(args.load), newest), continues
            return MegatronWeights(Path(args.load), args.ckpt_step), continues
    given = {
        "--load-hf": args.load_hf,
        "--pretrained-checkpoint": args.pretrained_checkpoint,
        "--load": args.load if finished(args.load) else None,
    }
    names = [f"{flag} {folder}" for flag, folder in given.items() if folder]
    if args.load_hf and len(names) > 1:
        resume = ", or --finetune to resume" if given["--load"] else ""
        raise StartupError(
            f"{' and '.join(names)}: a retrofit starts from one of them; drop the other{resume}"
        )
    if args.load_hf and args.ckpt_step is not None:
        raise StartupError(f"--ckpt-step {args.ckpt_step} with --load-hf: a HF folder has no steps; drop it")
    if args.load_hf:
        return HFWeights(Path(args.load_hf)), False
    if finished(args.pretrained_checkpoint):
        return MegatronWeights(Path(args.pretrained_checkpoint), args.ckpt_step), False
    wanted = [folder for folder in (args.load, args.pretrained_checkpoint) if folder]
    if not wanted:
        raise StartupError(
            "no checkpoint to start from: give --load-hf DIR (a HF folder), or --pretrained-checkpoint DIR "
            "(or --load DIR), a folder written by tools/convert.py import"
        )
    for folder in wanted:
        if (Path(folder) / "config.json").is_file():
            raise StartupError(f"{folder} is a HF folder; use --load-hf {folder}")
    raise StartupError(
        f"no finished checkpoint in {' or '.join(wanted)} (latest_checkpointed_iteration.txt is missing); "
        "import one with tools/convert.py import"
    )
