"""The mathematics of DMS in plain torch: eviction, dense reference attention, schedule, losses.

Nothing here knows Megatron or transformers.
"""
