"""Every touch of private names of Megatron, modelopt, torch and transformers; Megatron on CPU cores."""
