"""Arithmetic before a run: memory per rank, time per step, the best layout, and what fits at inference.

Pure Python, no torch: tools/plan.py answers in seconds on a laptop. Formulas are in the files that use them;
docs/planning.md says what they leave out and how far they are from what was measured.

Symbols: T tokens of context, L layers, H query heads, G KV heads, D head size, V vocabulary; n tokens of a
microbatch on one rank. Units: bytes, seconds, FLOPs; GB = 10^9 bytes.
"""
