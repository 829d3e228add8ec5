"""From the command line to Megatron's checked arguments; all errors a user can make are found here
(checks.py).

Order: DMS flags (before Megatron is even imported), Megatron's flags, the checkpoint to start from and its
architecture, the data, the teacher. Each error is one line, before any process group exists.
"""

import argparse
import difflib
import shutil
import traceback
from argparse import Namespace
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from megatron_dms.arguments import add_dms_arguments, dms_config_from_args
from megatron_dms.config import DMSConfig, flag_of
from megatron_dms.training import checks
from megatron_dms.training.checks import StartupError


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


def parse_megatron_args(dms: DMSConfig) -> tuple[Namespace, Path | None]:
    """All flags, completed by the architecture of the checkpoint to start from, checked and made global.

    Returns:
        The arguments, and the checkpoint whose weights a new retrofit starts from. That one is ours to load:
        Megatron's loading insists on every tensor of the model, and a base model has no linear predictor.
        None if Megatron resumes a retrofit from --load.

    Raises:
        StartupError: see the module's docstring.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_dms.checkpoint import CheckpointError
    from megatron_dms.checkpoint.megatron_folder import open_checkpoint
    from megatron_dms.training.data_arguments import validate_data_args
    from megatron_dms.training.token_files import DataError

    try:
        args = parse_args(_prepare_parser)
        folder, continues = starting_point(args)
        reader, stored = open_checkpoint(folder, args.ckpt_step)
        checks.check_supported(args)
        checks.check_positive(args)
        checks.check_checkpoint(args, dms, stored, folder, continues)
        if not continues:
            checks.check_start(dms, getattr(stored, "dms", None), folder, reader.common()["iteration"])
        validate_data_args(args)
        checks.check_layout(args, args)
        checks.check_training(args, dms)
        checks.check_teacher(args, dms)
    except (CheckpointError, DataError) as error:
        raise StartupError(str(error)) from error
    args.dms = dms.to_dict()  # saved with the arguments in every checkpoint
    if not continues:
        args.pretrained_checkpoint = None
        args.load = None if args.load and Path(args.load) == folder else args.load
    try:
        validate_args(args, {})
        set_global_variables(args)
    except (AssertionError, ValueError, RuntimeError) as error:
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # many asserts say nothing
        raise StartupError(f"Megatron refuses these flags: {said}") from error
    if args.rank == 0:
        checks.warn_if_not_zeroed(dms, stored, folder)
        if args.save:
            _carry_hf_files(folder, Path(args.save))
    return args, None if continues else folder


def _prepare_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the DMS flags; take defaults from the checkpoint's model, this project and the CPU platform."""
    from megatron_dms.checkpoint import checkpoint_args, set_parser_defaults
    from megatron_dms.platform import cpu
    from megatron_dms.platform.wheel import LOCAL_DEFAULTS

    parser.error = _raise_startup_error
    add_dms_arguments(parser)
    parser.set_defaults(attention_dropout=0.0, hidden_dropout=0.0, rerun_mode="disabled", eval_interval=100)
    if find_spec("transformer_engine") is None:
        parser.set_defaults(**LOCAL_DEFAULTS)
    if find_spec("fused_weight_gradient_mlp_cuda") is None:  # of Apex
        parser.set_defaults(gradient_accumulation_fusion=False)
    if cpu.installed():
        parser.set_defaults(**cpu.ARGUMENT_DEFAULTS)
    early, _ = parser.parse_known_args()
    folder, _ = starting_point(early)
    set_parser_defaults(parser, checkpoint_args(folder, early.ckpt_step), folder)
    return parser


def _raise_startup_error(message: str) -> NoReturn:
    raise StartupError(message)


def starting_point(args: Namespace) -> tuple[Path, bool]:
    """The checkpoint that Megatron will load, and whether training goes on there (False: starts anew)."""
    from megatron_dms.checkpoint.megatron_folder import RELEASE, TRACKER

    for folder, continues in ((args.load, not args.finetune), (args.pretrained_checkpoint, False)):
        if folder and (Path(folder) / TRACKER).is_file():
            release = (Path(folder) / TRACKER).read_text().strip() == RELEASE
            return Path(folder), continues and not release
    wanted = [folder for folder in (args.load, args.pretrained_checkpoint) if folder]
    if not wanted:
        raise StartupError(
            "no checkpoint to start from: give --pretrained-checkpoint DIR (or --load DIR), a folder written "
            "by tools/convert.py import"
        )
    raise StartupError(
        f"no finished checkpoint in {' or '.join(wanted)} (latest_checkpointed_iteration.txt is missing); "
        "import one with tools/convert.py import"
    )


def _carry_hf_files(source: Path, save: Path) -> None:
    """Copy the HF side files (config.json, tokenizer, ...) beside the new checkpoints: export needs them."""
    from megatron_dms.checkpoint.megatron_folder import HF
    from megatron_dms.checkpoint.staging import staged_folder

    if (source / HF).is_dir() and not (save / HF).exists():
        save.mkdir(parents=True, exist_ok=True)
        with staged_folder(save / HF, force=False) as staged:
            shutil.copytree(source / HF, staged, dirs_exist_ok=True)
