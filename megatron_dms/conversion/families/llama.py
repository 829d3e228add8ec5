"""Llama 2, 3, 3.1, 3.2 (text): the plain decoder, any RoPE, tied or untied."""

from megatron_dms.conversion.families.decoder import Family

FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LlamaForCausalLMDMS"),
    qk_norm=False,
    default_head_size=None,  # hidden / heads, where config.json has no head_dim
)
