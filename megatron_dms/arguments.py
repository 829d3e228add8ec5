"""The flags --dms-*, generated from DMSConfig, so that no setting is described twice."""

import argparse
from dataclasses import fields
from typing import Any

from megatron_dms.config import DMSConfig, flag_of


def add_dms_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one flag for each field of DMSConfig. Megatron calls this as its `extra_args_provider`."""
    group = parser.add_argument_group(
        "DMS", "Dynamic Memory Sparsification: a KV cache that learns to forget"
    )
    for item in fields(DMSConfig):
        default = "none" if item.default is None else item.default
        if item.type is bool:
            kind: dict[str, Any] = {"action": "store_true"}
        else:
            kind = {
                "type": item.type if item.type in (int, float) else str,
                "choices": item.metadata["choices"],
            }
        group.add_argument(
            flag_of(item.name),
            dest=destination(item.name),
            default=item.default,
            **kind,
            help=f"{item.metadata['help']} (default: {default})".replace("%", "%%"),
        )
    return parser


def destination(name: str) -> str:
    """Return the attribute of Megatron's argument namespace that holds a field."""
    return f"dms_{name}"


def dms_config_from_args(args: Any) -> DMSConfig:
    """Build the typed settings from Megatron's argument namespace."""
    return DMSConfig(**{item.name: getattr(args, destination(item.name)) for item in fields(DMSConfig)})
