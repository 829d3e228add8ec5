"""What made samples and figures: commit, versions of the libraries, machine."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def made_by(device: str = "cpu") -> dict[str, str]:
    """Return the commit of this checkout ("unknown" outside a checkout), versions, and the machine.

    Args:
        device: "cpu", or a device that torch knows.
    """
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"commit": commit, **versions, "machine": _machine(device)}


def _machine(device: str) -> str:
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
