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
CONFIG_MODULE = "model_config_dms"
_SUFFIX = "_dms"
_OTHER_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
"""What else transformers would build from one of these base models."""


def base_model_type(model_type: str) -> str:
    """Return the base model's model type for that of an export, such as qwen3 for qwen3_dms."""
    base = model_type.removesuffix(_SUFFIX)
    return base if base in MODEL_CLASSES else model_type


def export_files() -> list[Path]:
    """The Python files to copy, side by side, into the folder of an exported checkpoint."""
    return sorted(Path(__file__).parent.glob("*_dms.py"))


def config_entries(model_type: str, settings: DMSSettings) -> dict[str, Any]:
    """Return the keys to add to (or replace in) the base model's config.json.

    The model type becomes that of model_config_dms.py, so that no other code takes an export for its base
    model.

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
    config_name = class_name.replace("ForCausalLMDMS", "Config")
    return {
        "architectures": [class_name],
        "model_type": model_type + _SUFFIX,
        "auto_map": {
            "AutoConfig": f"{CONFIG_MODULE}.{config_name}",
            "AutoModelForCausalLM": f"{MODELING_MODULE}.{class_name}",
            **dict.fromkeys(_OTHER_AUTO_CLASSES, f"{MODELING_MODULE}.OnlyCausalLM"),
        },
        **settings.to_entries(),
    }
