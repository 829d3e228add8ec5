"""Load an exported DMS checkpoint with its own code.

A folder that is no such checkpoint, that is incomplete, or that this machine cannot run is refused. Nothing
is downloaded.
"""

from pathlib import Path
from typing import Any

from megatron_dms.hf import MODELING_MODULE, base_model_type
from megatron_dms.inference.checkpoints import read_config

PAGE_ATTENTION = ("torch", "triton")


def check_exported(folder: Path) -> None:
    """Check that a folder is an export of a DMS model, by config.json alone, so that no other code runs.

    Raises:
        ValueError: the folder does not exist, has no config.json, or does not come from tools/convert.py
            export.
    """
    auto_map = read_config(folder).get("auto_map")
    code = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if not str(code).startswith(f"{MODELING_MODULE}."):
        raise ValueError(
            f"{folder} is not an exported DMS checkpoint: auto_map in config.json names "
            f"{code or 'no class'}, expected one of {MODELING_MODULE}.py; make one with tools/convert.py"
        )


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder.

    Raises:
        ValueError: the folder has no config.json, or no tokenizer that can be loaded.
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer

    # Otherwise transformers asks for the configuration, which is code of the folder, or warns of its type.
    model_type = base_model_type(str(read_config(folder).get("model_type")))
    config = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None
    try:
        return AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} has no usable tokenizer: {reason}") from error


def check_device(name: str | None, page_attention: str) -> str:
    """The device to use: `name`, or by default cuda if there is one, and cpu otherwise.

    Raises:
        ValueError: torch does not see the device, or the page attention does not run on it.
    """
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name is None:
        name = "cuda" if "cuda" in devices else "cpu"
    if name not in devices:
        raise ValueError(f"--device is {name}, torch sees {', '.join(devices)}")
    if page_attention == "triton" and name == "cpu":
        raise ValueError("--page-attention triton needs a CUDA device; use torch on cpu")
    return name


def load_model(folder: Path, dtype: str, device: str, page_attention: str) -> Any:
    """Load the model, in evaluation mode. This runs the Python files of the folder.

    Args:
        dtype: one of checkpoints.DTYPES; "auto" is the dtype that config.json names.
        device: a device as `check_device` returns it.
        page_attention: one of PAGE_ATTENTION.

    Raises:
        ValueError: the weights are incomplete or do not fit the config.
    """
    from transformers import AutoModelForCausalLM

    model = load_weights(AutoModelForCausalLM, folder, dtype, device, trust_remote_code=True)
    model.page_attention = page_attention
    return model


def load_weights(model_class: Any, folder: Path, dtype: str, device: str, **options: Any) -> Any:
    """`model_class.from_pretrained`, but what it would only log is an error. Arguments as in `load_model`.

    Raises:
        ValueError: tensors are missing, unexpected, or do not fit the config.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings about tensors are errors below
    logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            folder,
            local_files_only=True,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            **options,
        )
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights cannot be read: {error}") from error
    except (RuntimeError, TypeError, KeyError, AttributeError, SyntaxError, ImportError) as error:
        # The config, the code, or weights of other shapes can raise these.
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    for problem in (
        "missing",
        "unexpected",
    ):  # transformers would go on with random values, or without these tensors
        keys = sorted(info[f"{problem}_keys"])
        if keys:
            raise ValueError(f"{folder}: {len(keys)} {problem} keys, among them {', '.join(keys[:3])}")
    return model.eval().to(device)
