"""How NVIDIA's and FastDMS's checkpoints write down their DMS settings."""

NVIDIA = {
    "architectures": ["Qwen3ForCausalLMDMS"],
    "auto_map": {
        "AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS",
        "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS",
    },
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
    "dms_window_size": 16,
    "dms_alpha_per": "head",
    "dms_tau": 0.1,
    "dms_cr": 8,
    "dms_disable_eviction": False,
    "dms_paged_attention_block_size": 8,
    "dms_chunked_prefill": 4096,
    "dms_preallocate_for_tokens": 4096,
}
FASTDMS = {
    "config": {
        "model": "a/b",
        "window_size": 16,
        "alpha_scale": 100.0,
        "alpha_offset": 5.0,
        "target_cr": 8,
        "context_len": 128,
        "compression_mode": "dms",
    },
    "log": [1, 2],
}
