"""What surrounds a job on a cluster: the preflight of its nodes, and torchrun's exit status."""
