"""Arithmetic before a run: memory per rank, time per step, the best layout, and what fits at inference.

The code is pure Python without torch, so `megatron-dms plan` answers in seconds on a laptop. Each file holds
the formulas it uses; docs/planning.md says what they leave out, and how far they are from measurements.

Symbols: T tokens of context, L layers, H query heads, G KV heads, D head size, V vocabulary; n tokens of a
microbatch on one rank. Units: bytes, seconds, FLOPs; GB = 10^9 bytes.
"""
