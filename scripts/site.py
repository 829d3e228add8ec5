#!/usr/bin/env python
"""Build the documentation site into build/site, with warnings as errors.

    python scripts/site.py

The pages, and the few other files that pages link to, are copied into build/site-source as they lie in the
repository, so that a link that works on GitHub works on the site. MkDocs (mkdocs.yml) makes the site of them.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "build" / "site-source"
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/**/*", "examples/**/README.md")
LINKED = ("examples/r1_with_thoughts.jinja", "examples/tiny_reasoner/results/*.png")


def copy_pages() -> int:
    """Copy the pages into an empty folder; return how many files there are."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    found = [path for pattern in (*PAGES, *LINKED) for path in ROOT.glob(pattern) if path.is_file()]
    for path in found:
        target = SOURCE / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return len(found)


if __name__ == "__main__":
    print(f"{copy_pages()} files copied to {SOURCE.relative_to(ROOT)}", flush=True)
    sys.exit(
        subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"], cwd=ROOT).returncode
    )
