"""What a run that goes on must have in common with the run so far. Each difference is named before the start.

A checkpoint holds the arguments of the run that saved it. Its position in the data is a number of samples.
Its learning-rate schedule counts samples, too. Its optimizer state is stored by parameter group and, with the
distributed optimizer, by layout. No check changes anything.
"""

from argparse import Namespace
from typing import Any

from megatron_dms.config import DMSConfig
from megatron_dms.data.data_flags import data_config
from megatron_dms.data.token_files import fingerprint
from megatron_dms.errors import StartupError

_NEW_RUN = "start a new retrofit from these weights with --finetune and another --save"
_OTHER_SCHEDULE = (
    "add --override-opt_param-scheduler to go on with the new schedule, or "
    "--use-checkpoint-opt_param-scheduler to keep the one so far"
)
# Megatron finds the state of a parameter group by these values, so no flag can change them.
_GROUP = ("optimizer", "lr", "min_lr", "start_weight_decay", "end_weight_decay")
# These come back with the state, whatever the command line says.
_STORED = ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "lion_beta1", "lion_beta2")
# What Megatron's scheduler compares, beside the numbers of samples.
_SCHEDULE = ("lr_decay_style", "lr_warmup_fraction", "lr_warmup_iters", "weight_decay_incr_style")
_LENGTHS = (
    *("global_batch_size", "train_iters", "lr_decay_iters"),
    *("train_samples", "lr_decay_samples", "lr_warmup_samples"),
)
_OTHER_DATA = "the training data (or its --split) is not what it was"
_RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    *("overlap_grad_reduce", "ddp_bucket_size", "ddp_num_buckets", "bf16", "fp16"),
)
_SMALL_DP = 40  # up to here, Megatron's buckets do not depend on DP


def samples_of(args: Namespace) -> dict[str, Any]:
    """Describe which samples a run reads in which order, as its checkpoints store the description.

    Args:
        args: Megatron's arguments, whose data flags were validated.
    """
    config = data_config(args)
    source = config.sources[0]
    assert source is not None  # data_config refuses a run without training data
    return {
        "data": fingerprint(source.prefix),
        "begin": source.begin,
        "end": source.end,
        "seq_length": config.seq_length,
        "seed": config.seed,
    }


def check_resumption(args: Namespace, saved: Namespace, dms: DMSConfig) -> None:
    """Compare a run's arguments with those of the run so far. What an old checkpoint lacks is not compared.

    Args:
        args: Megatron's arguments, completed by Megatron.
        saved: the arguments in the checkpoint.

    Raises:
        StartupError: the run cannot go on, or would not be the run so far; the message names a way on.
    """
    _check_samples(args, saved, dms)
    if args.no_load_optim:
        return
    _check_optimizer_layout(args, saved)
    for name in (*_GROUP, *_STORED):
        if (found := _changed(args, saved, name)) is not None:
            stored = "under" if name in _GROUP else "with"
            raise StartupError(
                f"{found}, and the optimizer's state is stored {stored} that value; use it again, or "
                f"{_NEW_RUN}"
            )
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    for name in (*_LENGTHS, *_SCHEDULE):
        if (found := _changed(args, saved, name)) is not None:
            counted = ", and the learning-rate schedule counts samples" if name in _LENGTHS else ""
            raise StartupError(f"{found}{counted}; {_OTHER_SCHEDULE}")


def _check_samples(args: Namespace, saved: Namespace, dms: DMSConfig) -> None:
    stored: dict[str, Any] | None = getattr(saved, "dms_samples", None)
    if stored is None or dms.resume_on_other_samples:
        return
    flags = {"seq_length": "--seq-length", "seed": "--seed"}
    for name, value in args.dms_samples.items():
        if name not in stored or stored[name] == value:
            continue
        what = f"{flags[name]} is {value}, but was {stored[name]}" if name in flags else _OTHER_DATA
        raise StartupError(
            f"{what} in the run so far: its {saved.consumed_train_samples} samples were others; "
            f"add --dms-resume-on-other-samples to go on with the next of the new ones, or {_NEW_RUN}"
        )


def _check_optimizer_layout(args: Namespace, saved: Namespace) -> None:
    flag = "--use-distributed-optimizer"
    before = getattr(saved, "use_distributed_optimizer", args.use_distributed_optimizer)
    if before != args.use_distributed_optimizer:
        done = "with" if before else "without"
        raise StartupError(
            f"the optimizer's state was saved {done} {flag}; {'add' if before else 'drop'} it, or {_NEW_RUN}"
        )
    if not before or getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        return
    sizes = [getattr(each, "data_parallel_size", 1) for each in (args, saved)]
    by_dp = args.overlap_grad_reduce and max(sizes) > _SMALL_DP
    for name in (*_LAYOUT, *(("data_parallel_size",) if by_dp else ())):
        if (found := _changed(args, saved, name)) is not None:
            raise StartupError(
                f"{found}, and the optimizer's state is stored by that layout; use it again (with "
                f"{_RESHARDABLE}, which saves checkpoints that go on in any layout), or {_NEW_RUN}"
            )


def _changed(args: Namespace, saved: Namespace, name: str) -> str | None:
    """Say how a setting differs from that of the run so far; None: it does not."""
    value, before = _value(args, name), _value(saved, name)
    if not hasattr(saved, name) or value == before:
        return None
    return f"--{name.replace('_', '-')} is {value}, but was {before} in the run so far"


def _value(args: Namespace, name: str) -> Any:
    value = getattr(args, name, None)
    if value is None and args.train_samples is None and name == "lr_decay_iters":
        return args.train_iters
    if value is None and args.train_samples is not None:  # Megatron fills these in at the start of training
        if name == "train_iters":
            return args.train_samples // args.global_batch_size
        if name == "lr_decay_samples":
            return args.train_samples
    return value
