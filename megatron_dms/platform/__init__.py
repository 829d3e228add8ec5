"""Where Megatron runs: on CUDA as it is, or on plain CPU cores with gloo."""
