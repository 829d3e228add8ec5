"""Dynamic Memory Sparsification (DMS) inside Megatron-Core: teach a pretrained LLM to forget."""

__version__ = "0.1.0"
