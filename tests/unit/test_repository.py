"""What surrounds the source: workflows, templates and citation are valid; the site builds cleanly."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import ROOT, run_python

SCHEMAS = {
    ".github/workflows/*.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
    ".github/ISSUE_TEMPLATE/[!c]*.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
    "CITATION.cff": "vendor.citation-file-format",
}


@pytest.mark.parametrize("pattern", SCHEMAS)
def test_files_follow_their_schema(pattern: str) -> None:
    """Catches: a key that GitHub does not know, a job without steps, a template without a body."""
    files = sorted(ROOT.glob(pattern))
    assert files
    done = run_python("-m", "check_jsonschema", "--builtin-schema", SCHEMAS[pattern], *files)
    assert done.status == 0, done.out + done.error


def test_a_broken_workflow_is_refused(tmp_path: Path) -> None:
    """Catches: a check of schemas that accepts anything."""
    broken = (ROOT / ".github/workflows/ci.yml").read_text().replace("runs-on:", "runs-upon:")
    (tmp_path / "ci.yml").write_text(broken)
    schema = SCHEMAS[".github/workflows/*.yml"]
    assert run_python("-m", "check_jsonschema", "--builtin-schema", schema, tmp_path / "ci.yml").status


def test_workflows_are_safe() -> None:
    """Catches: an action that is not pinned to a commit, a token with more rights than needed, injection."""
    done = subprocess.run(
        [Path(sys.executable).with_name("zizmor"), "--offline", "--no-progress", ".github"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_run_targets_that_exist() -> None:
    """Catches: a workflow that calls a make target which was renamed."""
    makefile = (ROOT / "Makefile").read_text()
    called = {
        word.split()[1]
        for path in ROOT.glob(".github/workflows/*.yml")
        for word in path.read_text().split("run: ")[1:]
        if word.startswith("make ")
    }
    assert called and all(f"\n{target}:" in makefile for target in called), called


def test_the_site_builds_without_a_warning() -> None:
    """Catches: a page that the navigation lacks, a link or an anchor that leads nowhere."""
    done = run_python(ROOT / "scripts" / "site.py", cwd=ROOT, timeout=300)
    assert done.status == 0, done.out + done.error
