"""The RoPE settings of config.json in both spellings of transformers, on the release that is installed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dms.conversion.rope import attention_factor, inverse_frequencies, rope_parameters
from tests.support.exported_models import export
from tests.support.tiny_dms_models import HEAD_SIZE, tiny_model

CONTEXT = {"original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **CONTEXT}
YARN = {"factor": 4.0, **CONTEXT}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, **YARN},
    "yarn with a factor": {"rope_type": "yarn", "rope_theta": 1e6, **YARN, "attention_factor": 1.5},
}


@pytest.mark.parametrize("spelling", ["transformers 5", "transformers 4", "by hand"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name: str, family: str, spelling: str, tmp_path: Path) -> None:
    """Catches: a base model saved by transformers 5, which transformers 4 rotates by its default base."""
    rope = dict(ROPES[name])
    export(tiny_model(family), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope_")}
    if spelling == "transformers 5":
        config |= {"rope_parameters": rope}
    elif spelling == "by hand":  # as people add a scaling to what transformers 4 has saved
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        config |= {"rope_theta": theta, "rope_parameters": {"type": kind, **rope}}
    else:
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if name == "default" else rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).model.rotary_emb
    expected = rope_parameters(config)
    torch.testing.assert_close(found.inv_freq, inverse_frequencies(expected, HEAD_SIZE), rtol=1e-6, atol=0)
    assert found.attention_scaling == pytest.approx(attention_factor(expected), rel=1e-6)
