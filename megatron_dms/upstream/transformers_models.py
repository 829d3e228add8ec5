"""A transformers model of a given class with random weights."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def model_from_config[M: PreTrainedModel](
    model_class: type[M], config: "PretrainedConfig", dtype: torch.dtype
) -> M:
    """Build a model of `model_class` without weights to load.

    transformers' public way, AutoModel.from_config, knows only classes that are registered.
    """
    return model_class._from_config(config, dtype=dtype)
