"""From the command line to Megatron's checked arguments; all errors a user can make are found here.

Order: DMS flags (before Megatron is even imported), Megatron's flags, the checkpoint to start from and its
architecture, the data, the teacher. Each error is one line, before any process group exists.
"""

import argparse
import difflib
import shutil
import sys
import traceback
from argparse import Namespace
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from megatron_dms.arguments import add_dms_arguments, dms_config_from_args
from megatron_dms.config import DMSConfig, flag_of

# Settings of Megatron's that DMS attention does not read: accepting them would silently ignore them.
_UNSUPPORTED = {
    "context_parallel_size": (1, "context parallelism is not implemented yet"),
    "virtual_pipeline_model_parallel_size": (None, "virtual pipeline stages are not implemented yet"),
    "num_virtual_stages_per_pipeline_rank": (None, "virtual pipeline stages are not implemented yet"),
    "num_layers_per_virtual_pipeline_stage": (None, "virtual pipeline stages are not implemented yet"),
    "num_experts": (None, "mixture-of-experts models are not supported"),
    "multi_latent_attention": (False, "multi-latent attention is not supported"),
    "attention_dropout": (0.0, "distillation compares logits, dropout only adds noise to them"),
    "hidden_dropout": (0.0, "distillation compares logits, dropout only adds noise to them"),
    "mtp_num_layers": (None, "multi-token prediction is not supported"),
    "calculate_per_token_loss": (
        False,
        "the forward step normalises by the tokens of the global batch itself",
    ),
    "rerun_mode": ("disabled", "the forward step reads a whole step's microbatches at once"),
    "use_torch_fsdp2": (False, "it wraps the model in another way"),
    "use_megatron_fsdp": (False, "it wraps the model in another way"),
    "window_size": (None, "DMS attention has a window of its own, --dms-window"),
    "yaml_cfg": (None, "flags and the checkpoint say what the model is"),
    "use_checkpoint_args": (False, "the architecture always comes from the checkpoint"),
    "spec": (None, "the layers are those of megatron_dms.mcore.layer_specs"),
    "fused_single_qkv_rope": (False, "the borrowed channel is read before RoPE"),
}


class StartupError(ValueError):
    """A mistake in flags, checkpoint or data: one line that says what was found, expected, and the fix."""


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
        _check_supported(args)
        _check_positive(args)
        _check_checkpoint(args, dms, stored, folder, continues)
        if not continues:
            _check_start(dms, getattr(stored, "dms", None), folder, reader.common()["iteration"])
        validate_data_args(args)
        _check_layout(args, args)
        _check_training(args, dms)
        _check_teacher(args, dms)
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
        _warn_if_not_zeroed(dms, stored, folder)
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


def _check_supported(args: Namespace) -> None:
    for name, (expected, reason) in _UNSUPPORTED.items():
        found = getattr(args, name, expected)
        if found != expected:
            raise StartupError(
                f"--{name.replace('_', '-')} is {found}, expected {expected} with DMS: {reason}"
            )


def _check_positive(args: Namespace) -> None:
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "seq_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise StartupError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")


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


def _check_checkpoint(
    args: Namespace, dms: DMSConfig, stored: Namespace, folder: Path, continues: bool
) -> None:
    """Compare flags with the checkpoint's model and DMS settings."""
    from megatron_dms.checkpoint import check_model_args, set_model_args

    check_model_args(args, stored)
    set_model_args(args, stored)
    if args.seq_length is None or args.seq_length > args.max_position_embeddings:
        raise StartupError(
            f"--seq-length is {args.seq_length}, but the model has {args.max_position_embeddings} positions "
            "(max_position_embeddings); use a shorter --seq-length"
        )
    if getattr(stored, "dms", None):
        try:
            dms.check_against(stored.dms, resuming=continues)
        except ValueError as error:
            raise StartupError(f"{error} ({folder})") from error
    elif continues:
        raise StartupError(f"{folder} was trained without DMS; add --finetune to start a retrofit from it")


def _check_start(dms: DMSConfig, stored: dict[str, Any] | None, folder: Path, iteration: int) -> None:
    """What a new retrofit's borrowed channel is when it starts; stored: the checkpoint's DMS settings."""
    if not dms.borrows_channel or dms.zeroing_steps:
        return
    zeroing = (stored or {}).get("zeroing_steps", 0)
    if zeroing and iteration <= zeroing:
        raise StartupError(
            f"{folder} was saved at step {iteration}, within its zeroing phase of {zeroing} steps; start "
            f"from a later one, or use --dms-zeroing-steps {zeroing}"
        )


def _warn_if_not_zeroed(dms: DMSConfig, stored: Namespace, folder: Path) -> None:
    if dms.borrows_channel and not dms.zeroing_steps and not getattr(stored, "dms", None):
        print(
            f"warning: {folder} was never retrofitted and --dms-zeroing-steps is 0: the {dms.predictor} is "
            "cut out of attention at once and evicts at random until it has learned: expect a loss spike",
            file=sys.stderr,
        )


def _carry_hf_files(source: Path, save: Path) -> None:
    """Copy the HF side files (config.json, tokenizer, ...) beside the new checkpoints: export needs them."""
    from megatron_dms.checkpoint.megatron_folder import HF
    from megatron_dms.checkpoint.staging import staged_folder

    if (source / HF).is_dir() and not (save / HF).exists():
        save.mkdir(parents=True, exist_ok=True)
        with staged_folder(save / HF, force=False) as staged:
            shutil.copytree(source / HF, staged, dirs_exist_ok=True)


def _check_layout(args: Namespace, model: Namespace, whose: str = "the model") -> None:
    """Heads and layers of a model (the student's or the teacher's arguments) divide by the run's layout."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups"):
        heads = getattr(model, name)
        if heads % tp:
            fewer = ": several ranks would share one KV head's decision" if heads < tp else ""
            raise StartupError(
                f"--tensor-model-parallel-size is {tp}, but {whose} has {name} = {heads}, which it must "
                f"divide{fewer}; use a divisor of {heads}"
            )
    if model.num_layers % pp:
        raise StartupError(
            f"--pipeline-model-parallel-size is {pp}, but {whose} has {model.num_layers} layers, which it "
            f"must divide; use a divisor of {model.num_layers}"
        )
    if args.world_size % (tp * pp):
        raise StartupError(
            f"{args.world_size} processes, but TP {tp} x PP {pp} needs a multiple of {tp * pp}"
        )


def _check_training(args: Namespace, dms: DMSConfig) -> None:
    if dms.zeroing_steps and args.use_precision_aware_optimizer:
        raise StartupError(
            "--use-precision-aware-optimizer with --dms-zeroing-steps: the optimizer's master weights cannot "
            "be zeroed; drop it"
        )
    if args.save and not args.save_interval:
        raise StartupError("--save without --save-interval; add --save-interval STEPS")
    if dms.train == "predictor" and dms.borrows_channel:
        decay = max(args.weight_decay, args.start_weight_decay or 0, args.end_weight_decay or 0)
        if decay:
            raise StartupError(
                f"--weight-decay is {decay}, expected 0 with --dms-train predictor and a "
                "borrowed channel: decay would change the frozen rows of the QKV weight; add --weight-decay 0"
            )
        # Fused accumulation writes a weight's gradient past the hook that keeps frozen rows frozen.
        args.gradient_accumulation_fusion = False


def _check_teacher(args: Namespace, dms: DMSConfig) -> None:
    from megatron_dms.training.build import imported_teacher, teacher_args

    if dms.teacher is None:
        raise StartupError(
            "no teacher: give --dms-teacher DIR (a HF folder or a Megatron checkpoint; usually the model you "
            "start from), or --dms-teacher self with --dms-predictor linear --dms-train predictor"
        )
    if dms.teacher == "self":
        return
    teacher: Any = teacher_args(dms.teacher)
    imported_teacher(dms.teacher, args.save)
    if teacher.vocab_size != args.vocab_size:
        raise StartupError(
            f"the teacher {dms.teacher} has a vocabulary of {teacher.vocab_size}, the student has "
            f"{args.vocab_size}; distillation needs a teacher of the same tokenizer"
        )
    if getattr(teacher, "dms", None):
        raise StartupError(
            f"the teacher {dms.teacher} is a DMS model, expected a dense one; use its base model"
        )
    _check_layout(args, teacher, "the teacher")
    if args.seq_length > teacher.max_position_embeddings:
        raise StartupError(
            f"--seq-length is {args.seq_length}, but the teacher has {teacher.max_position_embeddings} "
            "positions; use a shorter --seq-length"
        )
