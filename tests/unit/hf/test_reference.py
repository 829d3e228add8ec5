"""The exported model against a second implementation of DMS, written from its definition
(dms_by_definition.py)."""

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_dms.hf.modeling_dms import LlamaForCausalLMDMS
from tests.support.dms_by_definition import reference
from tests.support.tiny_dms_models import FAMILIES_AND_SETTINGS, random_tokens, tiny_config, tiny_model


@pytest.mark.parametrize(("family", "setting"), FAMILIES_AND_SETTINGS)
@torch.no_grad()
def test_forward_is_the_definition(family, setting):
    """Catches, in attention_dms.py and sparse_attention_dms.py: a window off by one, a lag in the wrong
    direction, a decision read after the zeroing or from another head, one of the two zeroings left out, the
    linear predictor fed with the normed input, `z > 0` turned around."""
    predictor, granularity, (window, lag) = setting
    model = tiny_model(family, predictor=predictor, granularity=granularity, window=window, lag=lag)
    ids_BT = random_tokens(2, 23)
    logits_BTV = model(ids_BT, use_cache=False).logits
    for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
        expected = reference(model, ids_T)
        assert expected.margin > 1e-5, "decision too close to call; change the seed"
        share = expected.decision.double().mean().item()
        assert 0.3 < share < 0.9, f"{share:.2f} of the decisions evict: the test would show little"
        difference = (logits_TV - expected.logits).abs().max().item()
        print(f"largest difference {difference:.1e}, evicted {share:.2f}")
        assert difference < 1e-4


@pytest.mark.parametrize("predictor", ["query_channel", "key_channel"])
@torch.no_grad()
def test_zeroing_before_rope_only_is_the_definition(predictor: str) -> None:
    """FastDMS's runtime does so. Catches: the setting not read, or read the wrong way round. (Logits of both
    settings must differ, or the test shows nothing.)"""
    model = tiny_model("llama", predictor=predictor, lag=0, zeroing="before_rope")
    around = tiny_model("llama", predictor=predictor, lag=0)
    ids_BT = random_tokens(1, 23)
    found = model(ids_BT, use_cache=False).logits[0]
    expected = reference(model, ids_BT[0])
    assert expected.margin > 1e-5
    assert (found - expected.logits).abs().max() < 1e-4
    assert (found - around(ids_BT, use_cache=False).logits[0]).abs().max() > 1e-2


@torch.no_grad()
def test_untrained_linear_predictor_is_the_base_model():
    """Catches dms_proj_alpha not starting at 0, and any change to attention where nothing is evicted."""
    torch.manual_seed(0)
    config = tiny_config("llama", predictor="linear", window=0, offset=0.0)  # evicts at any z > 0
    model = LlamaForCausalLMDMS(config).eval()
    base = LlamaForCausalLM(config).eval()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "dms_" not in k})
    ids_BT = random_tokens(2, 23)
    assert torch.allclose(model(ids_BT).logits, base(ids_BT).logits, atol=1e-6)
    assert model.last_kv_stats.achieved_cr == 1.0


@torch.no_grad()
def test_predictor_bias_follows_attention_bias():
    """Catches a bias of dms_proj_alpha missing or left out of the logit, where the attention has biases."""
    model = tiny_model("llama", predictor="linear", attention_bias=True)
    alpha = model.model.layers[1].self_attn.dms_proj_alpha
    assert alpha.bias is not None
    assert tiny_model("llama", predictor="linear").model.layers[1].self_attn.dms_proj_alpha.bias is None
    for layer in model.model.layers:
        layer.self_attn.dms_proj_alpha.bias.fill_(-100.0)
    model(random_tokens(1, 9))
    assert model.last_kv_stats.evicted_fraction == 0.0
