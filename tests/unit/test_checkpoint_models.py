"""Tiny random HF checkpoints for the tests of megatron_dms.checkpoint, and what config.json says of them."""

import json
from pathlib import Path

import pytest
import torch

from megatron_dms.checkpoint import CheckpointError, megatron_args
from megatron_dms.checkpoint.families import read_model
from megatron_dms.checkpoint.rope import inverse_frequencies

VOCAB = 131  # odd and prime: no padding rule leaves it alone
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large, so that the logits depend on everything
}


def make_qwen3(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Tied, a head size (16) that is not hidden / heads (8), norms that are not all ones."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**SHAPE, "head_dim": 16, "tie_word_embeddings": True, **changes})
    return _save(Qwen3ForCausalLM(config), folder, dtype)


def make_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Untied, llama3 RoPE, several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{**SHAPE, "tie_word_embeddings": False, "rope_parameters": dict(LLAMA3), **changes}
    )
    return _save(LlamaForCausalLM(config), folder, dtype, max_shard_size="40KB")


def _save(model: torch.nn.Module, folder: Path, dtype: torch.dtype, **options: object) -> Path:
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.to(dtype).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_bytes(b'{"not": "parsed"}\r\n\xff')  # bytes that no text mode keeps
    (folder / "chat").mkdir()
    (folder / "chat" / "template.jinja").write_text("{{ messages }}")
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


BASE = {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({"rope_parameters": LLAMA3}, LLAMA3),
        (
            {"rope_theta": 10000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
            LLAMA3,
        ),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_both_spellings_of_rope_are_read(spelling: dict, expected: dict) -> None:
    """Catches: rope_theta or rope_scaling of older files ignored (then theta would be 10000 everywhere)."""
    assert read_model({**BASE, **spelling}).rope == expected
    assert megatron_args({**BASE, **spelling})["rotary_base"] == expected["rope_theta"]


def test_llama3_frequencies_equal_transformers() -> None:
    """Catches: the wrong side of a wavelength bound, a blend upside down, or rounding in another order."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**{**SHAPE, "hidden_size": 512, "rope_parameters": dict(LLAMA3)})
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    found = inverse_frequencies(LLAMA3, 128)
    plain = inverse_frequencies({"rope_type": "default", "rope_theta": 10000.0}, 128)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    kept, divided = found == plain, found == plain / 4.0
    assert kept.any() and divided.any() and (~kept & ~divided).any()  # all three ranges are there


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_parameters": {**LLAMA3, "beta": 1}}, "beta"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}}, "low_freq_factor"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_bias": "sometimes"}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "dtype"),
        ({"dms_window_size": 256, "dms_magic": 1}, "dms_magic"),
        (
            {"dms_window_size": 256, "dms_predictor": "linear", "dms_separate_alpha": False},
            "dms_separate_alpha",
        ),
    ],
)
def test_settings_that_are_not_understood_are_refused_by_name(change: dict, word: str) -> None:
    """Catches: a feature of the model dropped in silence (each case without its check converts, wrongly)."""
    with pytest.raises(CheckpointError, match=word):
        read_model({**BASE, **change})


def test_base_config_is_accepted() -> None:
    """Catches: the refusals above firing for a reason of their own."""
    model = read_model(BASE)
    assert (model.head_size, model.tied, model.dms) == (8, False, None)
