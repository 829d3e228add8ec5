"""Requests that the baselines cannot honour are refused by name, and damaged or foreign checkpoints are
not loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dms.hf.cache_dms import CACHE_NAME
from megatron_dms.inference.baselines import METHODS, load_plain, make_policy
from tests.support.baseline_cases import random_tokens, save_plain

SPARSE = [name for name in METHODS if name != "vanilla"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def model(folder):
    return load_plain(folder, "float32", "cpu")


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 is not supported with"),
        ({"use_cache": False}, "use_cache=False is not supported"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is not supported"),
    ],
)
def test_generation_modes(model, method, options, message):
    model.policy = make_policy(method, 2.0)
    with pytest.raises(ValueError, match=f"{message}.*{method}"):
        model.generate(random_tokens(1, 9), max_new_tokens=4, do_sample=False, **options)


def test_a_cache_of_another_budget(model):
    """Catches a policy that is set and not followed, because an older cache goes on."""
    model.policy = make_policy("tova", 2.0)
    cache, ids_BT = model.make_cache(8), random_tokens(1, 9)
    with pytest.raises(ValueError, match=f"{CACHE_NAME} is not supported with tova"):
        model.generate(ids_BT, past_key_values=cache, max_new_tokens=4)
    model.policy = make_policy("tova", 4.0)
    with pytest.raises(
        ValueError, match=r"this cache is one of TOVA.cr=2.0., the model's policy is TOVA.cr=4.0"
    ):
        model(ids_BT, past_key_values=cache)
    model.policy = make_policy("vanilla")
    with pytest.raises(ValueError, match="this cache is one of TOVA"):
        model.generate(ids_BT, past_key_values=cache, max_new_tokens=4)


@pytest.mark.parametrize("method", SPARSE)
def test_forwards_without_a_budget(model, method):
    """Catches a plain forward that reads everything under a method's name."""
    model.policy = make_policy(method, 2.0)
    ids_BT = random_tokens(2, 9)
    with pytest.raises(ValueError, match=f"budget of {method} depends on how long"):
        model(ids_BT)
    with pytest.raises(ValueError, match=f"{method} without a cache"):
        model(ids_BT, use_cache=False)
    cache = model.make_cache(3)
    model(ids_BT, past_key_values=cache)
    with pytest.raises(ValueError, match=f"{method} takes the prompt in one forward.*found 2 columns"):
        model(ids_BT[:, :2], past_key_values=cache)
    mask = torch.ones(2, 10)
    mask[1, 9] = 0
    with pytest.raises(ValueError, match="1 columns with padding"):
        model(ids_BT[:, :1], attention_mask=mask, past_key_values=cache)
    for _ in range(3):
        model(ids_BT[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="made for 3 tokens after the prompt"):
        model(ids_BT[:, :1], past_key_values=cache)
    with pytest.raises(NotImplementedError, match=f"CUDA graphs are not supported with {method}"):
        model.graphed_step(cache)
    model.page_attention = "triton"
    with pytest.raises(ValueError, match=f"page_attention is 'triton', {method} needs 'torch'"):
        model.make_cache(3)


def test_vanilla_does_what_a_dms_model_does(model):
    """Beams, chunks and continuation work without further code in vanilla."""
    ids_BT = random_tokens(2, 9)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids_BT, **options)
    assert torch.equal(model.generate(ids_BT, prefill_chunk_size=4, **options), expected)
    assert torch.equal(model.generate(ids_BT, use_cache=False, **options), expected)
    beams = model.generate(ids_BT, num_beams=3, **options)
    assert torch.equal(model.generate(ids_BT, num_beams=3, use_cache=False, **options), beams)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3_text"}, "model_type of .* is 'gemma3_text', expected one of llama, mistral"),
        ({"model_type": None}, "model_type of .* is None"),
        ({"dms_window_size": 16}, "is a DMS checkpoint .dms_window_size in its config.json."),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "brings code of its own"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window of .* is 4096, expected null"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "contains .'sliding_attention'"),
    ],
)
def test_foreign_checkpoints(tmp_path, changes, message):
    save_plain(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_plain(tmp_path, "float32", "cpu")


def test_a_missing_sliding_window_is_the_familys_default(tmp_path):
    save_plain(tmp_path, "mistral")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("sliding_window", None)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"sliding_window of .* is 4096"):
        load_plain(tmp_path, "float32", "cpu")


def test_damaged_checkpoints(tmp_path):
    """Catches weights that are random because they were missing, or left unused."""
    with pytest.raises(ValueError, match=r"config.json: No such file"):
        load_plain(tmp_path, "float32", "cpu")
    save_plain(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)

    def load_with(changed):
        save_file(changed, weights, metadata={"format": "pt"})
        load_plain(tmp_path, "float32", "cpu")

    norm = "model.layers.1.self_attn.k_norm.weight"
    with pytest.raises(ValueError, match=f"1 missing keys, among them {norm}"):
        load_with({name: x for name, x in tensors.items() if name != norm})
    with pytest.raises(ValueError, match=r"1 unexpected keys, among them model.layers.1.self_attn.extra"):
        load_with(tensors | {"model.layers.1.self_attn.extra": torch.ones(2)})
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_with(tensors | {norm: torch.ones(3)})
    for text, message in (("[]", "holds a list"), ("{", "is not JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_plain(tmp_path, "float32", "cpu")
