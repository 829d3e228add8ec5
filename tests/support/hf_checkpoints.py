"""Tiny random HF checkpoints, one maker for each family of models."""

import json
from pathlib import Path

import torch

VOCAB = 131  # odd and prime: no padding rule leaves it alone
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
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
    """Save a tied Qwen3 whose head size (16) is not hidden / heads (8) and whose norms are not all ones."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**SHAPE, "head_dim": 16, "tie_word_embeddings": True, **changes})
    return save(Qwen3ForCausalLM(config), folder, dtype)


def make_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save an untied Llama with llama3 RoPE in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{**SHAPE, "tie_word_embeddings": False, "rope_parameters": dict(LLAMA3), **changes}
    )
    return save(LlamaForCausalLM(config), folder, dtype, max_shard_size="40KB")


def make_mistral(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save an untied Mistral with three query heads to a KV head, a head size of its own and yarn RoPE."""
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"num_attention_heads": 6, "head_dim": 8, "sliding_window": None}
    config = MistralConfig(**{**SHAPE, **shape, "rope_parameters": dict(YARN), **changes})
    return save(MistralForCausalLM(config), folder, dtype)


def make_qwen2(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save a tied Qwen2 with linear RoPE and biases on q, k and v that are not zero."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**{**SHAPE, "tie_word_embeddings": True, "rope_parameters": dict(LINEAR), **changes})
    return save(Qwen2ForCausalLM(config), folder, dtype, max_shard_size="40KB")


MAKERS = {"llama": make_llama, "mistral": make_mistral, "qwen2": make_qwen2, "qwen3": make_qwen3}


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype, **options: object) -> Path:
    """Save a model with random norms and biases, a tokenizer that no program parses, and a folder beside
    it."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.to(dtype).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_bytes(b'{"not": "parsed"}\r\n\xff')  # bytes that no text mode keeps
    (folder / "chat").mkdir()
    (folder / "chat" / "template.jinja").write_text("{{ messages }}")
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    removed = {key for key, value in changes.items() if value is None}
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))
