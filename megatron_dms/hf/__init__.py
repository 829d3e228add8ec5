"""The exported DMS model for transformers, and what a converter needs to write an export.

The `*_dms.py` files of this folder are copied flat into every exported checkpoint, where transformers loads
them with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. They import only torch and
transformers, and triton if it is asked for. This file is not copied, and importing it imports none of the
three.
"""

from pathlib import Path
from typing import Any

from .configuration_dms import DMSSettings

MODELING_MODULE = "modeling_dms"
MODEL_CLASSES = {
    "llama": "LlamaForCausalLMDMS",
    "mistral": "MistralForCausalLMDMS",
    "qwen2": "Qwen2ForCausalLMDMS",
    "qwen3": "Qwen3ForCausalLMDMS",
}
SUPPORTED_MODEL_TYPES = tuple(MODEL_CLASSES)


def export_files() -> list[Path]:
    """The Python files to copy, side by side, into the folder of an exported checkpoint."""
    return sorted(Path(__file__).parent.glob("*_dms.py"))


def config_entries(model_type: str, settings: DMSSettings) -> dict[str, Any]:
    """Return the keys to add to (or replace in) the base model's config.json; `model_type` itself stays.

    Args:
        model_type: the base model's model type, one of SUPPORTED_MODEL_TYPES.

    Raises:
        ValueError: no class is exported for the model type; the message names it.
    """
    if model_type not in MODEL_CLASSES:
        raise ValueError(
            f"model_type is {model_type!r}, expected one of {list(SUPPORTED_MODEL_TYPES)}; to export another "
            f"family, add its class to megatron_dms/hf/{MODELING_MODULE}.py and its name to MODEL_CLASSES"
        )
    class_name = MODEL_CLASSES[model_type]
    return {
        "architectures": [class_name],
        "auto_map": {"AutoModelForCausalLM": f"{MODELING_MODULE}.{class_name}"},
        **settings.to_entries(),
    }
