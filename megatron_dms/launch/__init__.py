"""Around a job: the preflight, torchrun's exit status, a check by kills."""
