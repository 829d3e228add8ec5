"""Load a plain Hugging Face checkpoint as a model with a policy. Nothing is downloaded, and no code of the
folder runs."""

from pathlib import Path
from typing import Any

from megatron_dms.inference.checkpoints import read_config
from megatron_dms.inference.loading import load_weights


def load_plain(folder: Path, dtype: str, device: str) -> Any:
    """Load the model, in evaluation mode and without gradients; its policy is "vanilla".

    Args:
        dtype: one of megatron_dms.inference.checkpoints.DTYPES; "auto" is the dtype that config.json names.
        device: a device as megatron_dms.inference.loading.check_device returns it.

    Raises:
        ValueError: the checkpoint is not plain, belongs to another family, or has sliding-window layers; or
            tensors are missing, unexpected, or do not fit the config.
    """
    model_type = _check_plain(folder)
    from .model import PLAIN_CLASSES

    return load_weights(PLAIN_CLASSES[model_type], folder, dtype, device).requires_grad_(False)


def _check_plain(folder: Path) -> str:
    """The model type of a plain checkpoint, from config.json alone."""
    from megatron_dms.hf import SUPPORTED_MODEL_TYPES

    config = read_config(folder)
    dms_keys = sorted(key for key in config if key.startswith("dms_"))
    if dms_keys:
        raise ValueError(
            f"{folder} is a DMS checkpoint ({dms_keys[0]} in its config.json): a training-free method goes "
            "with the model before its retrofit; evaluate this one with its own code"
        )
    if config.get("auto_map"):
        raise ValueError(f"{folder} brings code of its own (auto_map in its config.json), which is not run")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model_type of {folder} is {model_type!r}, expected one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    # In Mistral's config a number switches sliding windows on, and a missing key means the default, 4096.
    if model_type == "mistral" and config.get("sliding_window", 4096) is not None:
        raise ValueError(
            f"sliding_window of {folder} is {config.get('sliding_window', 4096)}, expected null: models with "
            "sliding-window layers are not supported"
        )
    return model_type
