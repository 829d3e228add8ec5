"""Tiny random models with DMS, as an export loads them, and the settings that tests go through."""

import itertools

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megatron_dms.hf import MODEL_CLASSES, config_entries, modeling_dms
from megatron_dms.hf.configuration_dms import DMSSettings

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_SIZE, VOCAB = 3, 4, 2, 16, 64
WINDOWS_AND_LAGS = [(0, 0), (0, 1), (3, 0), (3, 1), (3, 3), (7, 0), (7, 1), (7, 7)]
SETTINGS = list(
    itertools.product(("query_channel", "linear", "key_channel"), ("head", "layer"), WINDOWS_AND_LAGS)
)


def tiny_config(
    family: str,
    predictor: str = "query_channel",
    granularity: str = "head",
    window: int = 3,
    lag: int = 1,
    offset: float = -0.5,
    zeroing: str = "around_rope",
    **changes: object,
) -> PretrainedConfig:
    """Return the config of a model with GQA, head size 16 and three layers.

    Its scale and offset let a good half of the pairs be evicted.
    """
    decisions = {"predictor": predictor, "granularity": granularity, "window": window, "lag": lag}
    decisions |= {"zeroing": zeroing}
    settings = DMSSettings(**decisions, alpha_scale=1.0, alpha_offset=offset, target_cr=4.0)
    entries = config_entries(family, settings)
    family_changes = {"mistral": {"sliding_window": None}}.get(family, {})
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config_class = getattr(modeling_dms, MODEL_CLASSES[family]).config_class
    return config_class(**(sizes | family_changes | entries | changes))


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw weights with which attention is far from uniform and no norm is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)


def tiny_model(family: str = "qwen3", seed: int = 0, **settings: object) -> PreTrainedModel:
    """Return a random model in fp32 whose attention is far from uniform and whose norms are not 1."""
    config = tiny_config(family, **settings)
    model = getattr(modeling_dms, MODEL_CLASSES[family])(config).eval()
    draw_weights(model, seed)
    return model


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Return token ids [batch, length]; none of them is the padding id 0."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


FAMILIES_AND_SETTINGS = [
    *itertools.product(("qwen3", "llama"), SETTINGS),
    # what sets these apart is in their base models: one setting of each predictor shows it
    *itertools.product(
        ("mistral", "qwen2"), [setting for setting in SETTINGS if setting[1:] == ("head", (3, 1))]
    ),
]
