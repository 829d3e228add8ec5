"""How config.json of each family of models is read, and what is refused."""

import pytest
import torch

from megatron_dms.conversion import CheckpointError, megatron_args
from megatron_dms.conversion.families import read_model
from megatron_dms.conversion.rope import attention_factor, inverse_frequencies
from tests.support.hf_checkpoints import LINEAR, LLAMA3, MAKERS, SHAPE, YARN

NVIDIA = {"dms_window_size": 16, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0}


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


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": LINEAR,
    "dynamic": {**LINEAR, "rope_type": "dynamic"},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, all keys": {
        **{**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.3},
        "truncate": False,
    },
    "yarn, its factor given": {**YARN, "attention_factor": 1.3},
    "yarn over the whole context": {**YARN, "original_max_position_embeddings": None},
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_equals_transformers(name: str) -> None:
    """Catches: the wrong side of a bound, a blend upside down, a default of yarn's, the attention factor."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin

    given = {key: value for key, value in ROPES[name].items() if value is not None}
    config = LlamaConfig(**{**SHAPE, "hidden_size": 512, "rope_parameters": dict(given)})
    kind = given["rope_type"]
    rope = read_model({**BASE, "hidden_size": 512, "rope_parameters": given}).rope
    found = inverse_frequencies(rope, 128)
    if kind == "default":
        expected, factor = 1.0 / 5e5 ** (torch.arange(0, 128, 2).float() / 128), 1.0
    else:
        assert isinstance(config, RotaryEmbeddingConfigMixin)
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert torch.equal(found, expected)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)
    if kind in ("llama3", "yarn") and "original_max_position_embeddings" in given:
        plain = inverse_frequencies(ROPES["default"] | {"rope_theta": 10000.0}, 128)
        kept, divided = found == plain, (found * 4.0 / plain - 1).abs() < 1e-6
        assert kept.any() and divided.any() and (~kept & ~divided).any()  # all three ranges are there


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1}}, "alpha"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 3}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": -4.0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}}, "keep one"),
        ({"rope_parameters": {**LLAMA3, "beta": 1}}, "beta"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}}, "low_freq_factor"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 2.0}},
            "factor is 4.0 in rope_scaling",
        ),
        ({"rope_parameters": {**LINEAR, "factor": float("nan")}}, "factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"use_mrope": True}, "use_mrope"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 255},
            "sliding_window",
        ),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_bias": True},
            "attention_bias",
        ),
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
        ({**NVIDIA, "dms_magic": 1}, "dms_magic"),
        ({"dms_window_size": 256, "dms_alpha_scale": 100.0}, "dms_initial_alpha_offset missing"),
        ({**NVIDIA, "dms_disable_eviction": True}, "dms_disable_eviction"),
        (
            {**NVIDIA, "dms_predictor": "linear", "dms_separate_alpha": False},
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


@pytest.mark.parametrize("name", MAKERS)
def test_defaults_of_absent_keys_are_those_of_transformers(name: str) -> None:
    """Catches: a family whose head size, KV heads, theta or tying differ in an old config.json."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[name]
    heads = {"num_attention_heads": 64, "hidden_size": 1024}
    theirs = config_class(**heads)
    base = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    family = {"model_type": name, "architectures": [config_class.__name__.replace("Config", "ForCausalLM")]}
    if name == "mistral":
        with pytest.raises(
            CheckpointError, match="sliding_window is missing"
        ):  # transformers' default is 4096
            read_model({**base, **heads, **family})
        family["sliding_window"] = None
    ours = read_model({**base, **heads, **family})
    assert ours.groups == theirs.num_key_value_heads
    assert ours.head_size == (getattr(theirs, "head_dim", None) or 1024 // 64)
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.rope["rope_theta"] == theirs.rope_parameters["rope_theta"]
