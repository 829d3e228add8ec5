"""Mistral, dense and without a sliding window (7B from v0.2 on, Nemo, Small): Llama's decoder under its own
name."""

from megatron_dms.conversion.families.decoder import Family

FAMILY = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM", "MistralForCausalLMDMS"),
    qk_norm=False,
    default_head_size=None,  # hidden / heads, where config.json has no head_dim (Nemo has one)
    default_groups=8,  # of transformers' MistralConfig
    sliding_window_alone=True,  # there is no use_sliding_window here, and the default is 4096
)
