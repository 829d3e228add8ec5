"""Qwen2, Qwen2.5 and the R1-distilled Qwen models, dense: Llama's decoder with biases on q, k and v."""

from megatron_dms.conversion.families.decoder import Family

FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2ForCausalLMDMS"),
    qk_norm=False,
    default_head_size=None,  # always hidden / heads
    default_groups=32,  # of transformers' Qwen2Config
    qkv_bias=True,  # fixed in transformers' model, no key of config.json says so
)
