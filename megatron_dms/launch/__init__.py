"""Before a job burns hours: what every node must hold, checked on every node (preflight.py)."""
