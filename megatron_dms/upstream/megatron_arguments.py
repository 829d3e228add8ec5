"""Megatron's flags: the defaults that this machine needs, and Megatron's own checks of all of them."""

import argparse
from argparse import Namespace
from importlib.util import find_spec

from megatron_dms.upstream import cpu

# Megatron's defaults ask for Transformer Engine and its fused kernels. These run without it.
_WITHOUT_TRANSFORMER_ENGINE = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "no_persist_layer_norm": True,
}
_WITHOUT_APEX = {"gradient_accumulation_fusion": False}


def set_machine_defaults(parser: argparse.ArgumentParser) -> None:
    """Replace the defaults that ask for what is not here: Transformer Engine, Apex, a CUDA device."""
    if find_spec("transformer_engine") is None:
        parser.set_defaults(**_WITHOUT_TRANSFORMER_ENGINE)
    if find_spec("fused_weight_gradient_mlp_cuda") is None:  # the kernel that Apex brings
        parser.set_defaults(**_WITHOUT_APEX)
    if cpu.installed():
        parser.set_defaults(**cpu.ARGUMENT_DEFAULTS)


def validate(args: Namespace) -> None:
    """Let Megatron check all its arguments and complete them in place.

    Megatron drops --async-save where there is no persistent worker. The way of saving that forks one process
    for each save, if the tensors are in main memory, is still there, and it is a snapshot on CPU as well. So
    the flag is put back after Megatron's checks.

    Raises:
        AssertionError, ValueError, RuntimeError: Megatron refuses a flag.
    """
    from megatron.training.arguments import validate_args

    asynchronous, args.async_save = args.async_save, False
    validate_args(args, {})
    args.async_save = asynchronous
