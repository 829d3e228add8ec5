"""Start-up in three steps: parse the command line, check it, open the outputs.

`parse` reads the DMS flags (before Megatron is imported), then Megatron's flags, with defaults from the
checkpoint that the run begins with. `check` finds all errors that a user can make (checks.py, layout.py) and
completes Megatron's arguments. `open_outputs` opens the logs and prepares the folder of --save. Each error is
a StartupError of one line, and all are raised before any process group exists.
"""

import argparse
import contextlib
import copy
import difflib
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_dms.arguments import add_dms_arguments, dms_config_from_args
from megatron_dms.config import DMSConfig, flag_of
from megatron_dms.errors import CheckpointError, DataError, StartupError
from megatron_dms.training import checks

if TYPE_CHECKING:
    from megatron_dms.resilience.ownership import Owner
    from megatron_dms.training.weights import Weights


_CLAIM_WAIT = 300.0  # seconds: ranks start at different times, and imports from a network disk take long


@dataclass(frozen=True)
class Run:
    """What a command line asks for, and the weights that it names."""

    dms: DMSConfig
    args: Namespace
    """Megatron's arguments."""
    start: "Weights"
    """The weights that the run begins with."""
    continues: bool
    """Whether training goes on where `start` was saved. False: a new retrofit starts from these weights."""
    teacher: "Weights | None" = None
    """The teacher's weights. None before `check`, and if the teacher is the student itself."""

    @property
    def new_start(self) -> "Weights | None":
        """The weights that a new retrofit starts from; None if Megatron resumes a retrofit from --load.

        This project loads them itself: Megatron's loading insists on every tensor of the model, and a base
        model has no linear predictor.
        """
        return None if self.continues else self.start


def parse() -> Run:
    """Parse sys.argv, as Megatron does, and open the checkpoint that the run begins with.

    Raises:
        StartupError: an unknown flag, a value of the wrong type, an invalid DMS setting, or a checkpoint
            that cannot be opened.
    """
    dms = parse_dms_flags(sys.argv[1:])
    _prepare_machine()
    args, start, continues = _parse_megatron_flags()
    return Run(dms, args, start, continues)


def parse_dms_flags(argv: list[str]) -> DMSConfig:
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


def _prepare_machine() -> None:
    """Let Megatron run here: on the CPU if there is no CUDA device, and without compiling its helpers."""
    import torch

    if not torch.cuda.is_available():
        from megatron_dms.upstream import cpu

        cpu.install()  # before the first import of megatron
    from megatron_dms.upstream.wheel import skip_helper_compilation

    skip_helper_compilation()


def _parse_megatron_flags() -> tuple[Namespace, "Weights", bool]:
    """Parse all flags with Megatron's parser.

    The defaults come from this machine, from this project, and from the model of the checkpoint that the run
    begins with. So the checkpoint is opened while the parser is made.

    Returns:
        Megatron's arguments, and what `starting_point` returns.
    """
    from megatron.training.arguments import parse_args

    from megatron_dms.conversion import set_parser_defaults
    from megatron_dms.upstream.megatron_arguments import set_machine_defaults

    found: list[tuple[Weights, bool]] = []

    def complete(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.error = _raise_startup_error  # type: ignore[method-assign]  # Megatron made it
        add_dms_arguments(parser)
        parser.add_argument(
            "--load-hf",
            metavar="DIR",
            help="start a retrofit from the weights of this HF folder, without converting them first",
        )
        parser.set_defaults(attention_dropout=0.0, hidden_dropout=0.0, rerun_mode="disabled")
        parser.set_defaults(eval_interval=100, cp_comm_type=["a2a"], async_strategy="mcore")
        set_machine_defaults(parser)
        start, continues = starting_point(parser.parse_known_args()[0])
        found.append((start, continues))
        set_parser_defaults(parser, start.args, start.tokenizer_folder)
        return parser

    try:
        args = parse_args(complete)
    except CheckpointError as error:
        raise StartupError(str(error)) from error
    ((start, continues),) = found
    return args, start, continues


def _raise_startup_error(message: str) -> NoReturn:
    raise StartupError(message)


def check(run: Run) -> Run:
    """Check everything in which a user can be wrong.

    Returns:
        The run with its teacher opened and with Megatron's arguments complete.

    Raises:
        StartupError: see the module's docstring.
    """
    from megatron_dms.conversion import check_model_args, set_model_args
    from megatron_dms.data.data_flags import validate_data_args
    from megatron_dms.training.layout import check_heads_and_layers, check_layout

    dms, args, start = run.dms, copy.copy(run.args), run.start
    try:
        checks.check_supported(args)
        checks.check_attention_backend(args, dms)
        checks.check_positive(args)
        check_model_args(args, start.args)
        set_model_args(args, start.args)
        checks.check_sequence_length(args)
        checks.check_stored_settings(dms, start, run.continues)
        if not run.continues:
            checks.check_start(dms, start)
        validate_data_args(args)
        check_layout(args)
        checks.check_training(args, dms)
        teacher = checks.open_teacher(args, dms)
        if teacher is not None:
            check_heads_and_layers(args, teacher.args, "the teacher")
    except (CheckpointError, DataError) as error:
        raise StartupError(str(error)) from error
    _complete(args, run)
    return replace(run, args=args, teacher=teacher)


def _complete(args: Namespace, run: Run) -> None:
    """Set the arguments that follow from the run, in place, and let Megatron check and complete the rest."""
    from megatron_dms.training.resumption import check_resumption, samples_of
    from megatron_dms.upstream.megatron_arguments import validate

    args.dms = run.dms.to_dict()  # saved with the arguments in every checkpoint
    if run.dms.train == "predictor" and run.dms.borrows_channel:
        # Fused accumulation writes a weight's gradient past the hook that keeps frozen rows frozen.
        args.gradient_accumulation_fusion = False
    if not run.continues:
        args.pretrained_checkpoint = None
        args.load = None if args.load and Path(args.load) == run.start.folder else args.load
    with _refusals_in_one_line():
        validate(args)
    args.dms_samples = samples_of(args)  # saved, too: a run that goes on compares
    if run.continues:
        check_resumption(args, run.start.args, run.dms)


def open_outputs(run: Run) -> "Owner | None":
    """Take the folder of --save; make the arguments Megatron's global ones, which opens its loggers; open the
    run log; put the HF side files into the folder of --save.

    Returns:
        On rank 0, what the folder of --save calls this run.

    Raises:
        StartupError: a file cannot be written, or --save holds another model's checkpoints or a run.
    """
    from megatron.training.global_vars import set_global_variables

    from megatron_dms.training.run_log import mirror_metrics, open_run_log

    args = run.args
    owner = _take_folder(args) if args.save else None
    with _refusals_in_one_line():
        mirror = open_run_log(args, run.start.iteration if run.continues else 0)
        set_global_variables(args)
        mirror_metrics(mirror)
    if args.rank == 0:
        checks.warn_if_not_zeroed(run.dms, run.start)
        if args.save:
            _carry_hf_files(run.start, Path(args.save), run.continues)
    return owner


def _take_folder(args: Namespace) -> "Owner | None":
    """Take the folder of --save on rank 0; the rank that writes the logs there waits for rank 0."""
    from megatron_dms.resilience.ownership import Owner, wait_for_claim

    save = Path(args.save)
    try:
        if args.rank == 0:
            return Owner.claim(save)
        if args.rank == args.world_size - 1:
            wait_for_claim(save, _CLAIM_WAIT)
        return None
    except CheckpointError as error:
        raise StartupError(str(error), one_rank=True) from error
    except OSError as error:
        raise StartupError(f"--save {save} cannot be written: {error}", one_rank=True) from error


@contextlib.contextmanager
def _refusals_in_one_line() -> Iterator[None]:
    """Turn the errors of Megatron's validation and of its loggers into StartupErrors."""
    try:
        yield
    except OSError as error:
        raise StartupError(f"the logs cannot be written: {error}", one_rank=True) from error
    except (AssertionError, ValueError, RuntimeError) as error:
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # many asserts say nothing
        raise StartupError(f"Megatron refuses these flags: {said}") from error
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        raise StartupError(
            f"W&B cannot be used: {error}; set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline",
            one_rank=True,
        ) from error


def _carry_hf_files(start: "Weights", save: Path, continues: bool) -> None:
    """Put the HF side files beside the new checkpoints, where an export looks for them.

    A new run replaces the side files that an earlier run of another model left. It refuses to do so if that
    run left checkpoints, too: they would be exported with the wrong files.
    """
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


def starting_point(args: Namespace) -> tuple["Weights", bool]:
    """Find the weights that the run begins with, and whether training goes on from them (False: it starts
    anew).

    A retrofit that was begun is resumed, whatever it started from. So the same command line starts a retrofit
    and resumes it.

    Args:
        args: the flags --load, --load-hf, --pretrained-checkpoint, --ckpt-step and --finetune.

    Raises:
        StartupError, CheckpointError: none or two of the flags name a checkpoint, or it cannot be used.
    """
    from megatron_dms.formats.megatron_folder import TRACKER
    from megatron_dms.resilience.run_folder import resume_point
    from megatron_dms.training.weights import HFWeights, MegatronWeights

    def finished(folder: str | None) -> bool:
        return (Path(folder) / TRACKER).is_file() if folder else False

    newest, _ = resume_point(Path(args.load)) if args.load else (None, {})
    if isinstance(newest, int) and not args.finetune:
        if args.ckpt_step is None:
            return _newest_readable(Path(args.load), newest), True
        return MegatronWeights(Path(args.load), args.ckpt_step), True
    if newest is not None and not args.load_hf:
        return MegatronWeights(Path(args.load), args.ckpt_step), False
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


def _newest_readable(load: Path, iteration: int) -> "Weights":
    """Open the checkpoint of `iteration`, or the newest finished one before it that describes itself.

    A checkpoint that does not is passed over here. All ranks decide what becomes of it when they verify its
    bytes (resilience/verified_saves.py).
    """
    from megatron_dms.resilience.run_folder import resume_point
    from megatron_dms.training.weights import MegatronWeights

    damaged: dict[int, str] = {}
    while True:
        try:
            return MegatronWeights(load, iteration)
        except Exception as error:  # unpickling damaged bytes may raise anything
            damaged[iteration] = f"{type(error).__name__}: {error}"
        older, _ = resume_point(load, damaged)  # raises if none is left
        if not isinstance(older, int):
            raise StartupError(f"--load {load} changed while it was read; start the run again")
        iteration = older
