"""A transformers model of a given class with random weights."""

from typing import Any

import torch


def model_from_config(model_class: type, config: Any, dtype: torch.dtype) -> Any:
    """Build a model of `model_class` without weights to load.

    transformers' public way, AutoModel.from_config, knows only classes that are registered.
    """
    return model_class._from_config(config, dtype=dtype)
