"""File formats: Megatron's checkpoints, safetensors, checksums, pieces of tensors on disk. No model."""
