"""Measuring exported checkpoints: what they are asked, what they cost."""
