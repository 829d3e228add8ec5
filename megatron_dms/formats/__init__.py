"""File formats without any model: Megatron's checkpoints, safetensors, checksums, tensors on disk."""
