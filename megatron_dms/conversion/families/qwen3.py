"""Qwen3, dense: RMSNorm of each query and key head, head size apart from hidden / heads, tied or untied."""

from megatron_dms.conversion.families.decoder import Family

FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3ForCausalLMDMS"),  # the second is NVIDIA's DMS class
    qk_norm=True,
    default_head_size=128,  # of transformers' Qwen3Config, where config.json has no head_dim
    default_groups=32,
)
