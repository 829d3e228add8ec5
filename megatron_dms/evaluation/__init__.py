"""Ask exported checkpoints and baselines problems, grade the answers, and measure what they cost."""
