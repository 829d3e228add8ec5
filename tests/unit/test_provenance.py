"""What made a figure is told from the checkout that this package lies in."""

import subprocess
from pathlib import Path

from megatron_dms import provenance

ROOT = Path(__file__).resolve().parents[2]


def test_the_commit_is_this_checkouts() -> None:
    """Catches: git asked about another folder, so that every figure is made by an unknown commit."""
    assert provenance.ROOT == ROOT
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12"]
    known = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert provenance.made_by()["commit"].removesuffix("-dirty") == (known or "unknown")
