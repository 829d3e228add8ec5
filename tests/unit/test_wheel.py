"""The wheel works outside the checkout: every subcommand's help, a plan, and a conversion there and back."""

import json
import os
import shutil
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SOURCE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "megatron_dms")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")


def _run(folder: Path, *command: str | Path, status: int = 0, **environment: str) -> str:
    """What a command prints that is run in a folder and ends with this exit status."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=inherited | environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs, and nothing else."""
    work = tmp_path_factory.mktemp("wheel")
    (work / "source").mkdir()  # a build leaves folders behind
    for name in _SOURCE:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, work / "source" / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, work / "source" / name)
    offline = ("--no-deps", "--no-index")
    _run(work, *_PIP, "wheel", *offline, "--no-build-isolation", "--wheel-dir", work, work / "source")
    (wheel,) = work.glob("*.whl")
    _run(work, *_PIP, "install", *offline, "--target", work / "installed", wheel)
    return work / "installed"


def test_the_metadata_is_complete(installed: Path) -> None:
    """Catches: a field that pip or the package index would show empty, an extra that is not declared."""
    (folder,) = installed.glob("megatron_dms-*.dist-info")
    found = HeaderParser().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert found["Name"] == "megatron-dms" and found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.12" and found["Summary"] and found["Keywords"]
    assert found.get_all("Project-URL") and len(found.get_all("Classifier", [])) > 5
    assert {"te", "eval", "dev"} <= set(found.get_all("Provides-Extra", []))
    assert found.get_payload().startswith((ROOT / "README.md").read_text(encoding="utf-8")[:100])
    assert (folder / "licenses" / "LICENSE").exists()


def test_every_module_is_in_the_wheel(installed: Path) -> None:
    """Catches: a folder without __init__.py, or a data file that is not declared, left out of the wheel."""
    ours = {path.relative_to(ROOT) for path in (ROOT / "megatron_dms").rglob("*") if path.is_file()}
    there = {path.relative_to(installed) for path in installed.rglob("*")}
    assert not {path for path in ours - there if "__pycache__" not in path.parts}


def test_it_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """The console command, a plan, and a model that is imported and exported again, byte for byte.

    Catches: a tool that looks for the checkout, code of an export that the wheel lacks.
    """
    path = {"PYTHONPATH": str(installed)}
    where = _run(tmp_path, sys.executable, "-c", "import megatron_dms; print(megatron_dms.__file__)", **path)
    assert Path(where.strip()).is_relative_to(installed)
    command = (sys.executable, "-m", "megatron_dms.cli")
    assert "plan" in _run(tmp_path, installed / "bin" / "megatron-dms", "--help", **path)
    assert "--hf DIR" in _run(tmp_path, *command, "convert", "export", "--help", **path)
    plan = _run(tmp_path, *command, "plan", "train", "--model", "llama-3.2-1b", **path)
    assert json.loads(plan.splitlines()[-1])["best"]

    base = ROOT / "examples" / "tiny_reasoner" / "base"
    words = ("--megatron", tmp_path / "megatron", "--hf")
    counted = _run(tmp_path, *command, "convert", "import", *words, base, **path)
    assert json.loads(counted.splitlines()[-1])["tensors"] > 0
    _run(tmp_path, *command, "convert", "export", *words, tmp_path / "hf", **path)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (base / name).read_bytes(), name


def test_a_retrofit_starts_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Catches: an entry that only a clone has. The flag is wrong, so the run ends before Megatron starts."""
    command = [sys.executable, "-m", "megatron_dms.pretrain", "--dms-window", "-1"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("pretrain_dms.py: error: --dms-window"), (
        done.stderr
    )
