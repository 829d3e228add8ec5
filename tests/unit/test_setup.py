"""Set-up: the interpreter is found among broken ones, and setup.py allows the pinned versions."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FIND_PYTHON = ROOT / "scripts" / "find_python.sh"


def fake(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: str, says: Path | None = None) -> Path:
    """Make an interpreter that answers the script's question as a real one of that version would."""
    major, minor = version.split(".")
    return fake(path, f"echo {major} {minor} {says or path}")


def pyenv_shim(path: Path) -> Path:
    """Make the file that pyenv puts on PATH for a version that is installed but not switched on."""
    return fake(path, f"echo 'pyenv: {path.name}: command not found' >&2; exit 127")


def find(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the script with nothing but tmp_path/bin on PATH and tmp_path/home as home."""
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home")}
    command = ["/bin/sh", str(FIND_PYTHON)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_each_candidate_is_run(tmp_path: Path) -> None:
    """Failing shims for 3.12 and 3.13 and a python3 that is 3.11 are passed over; pyenv's own 3.12 is taken.

    Catches: a candidate believed by its name, 3.11 accepted, $(pyenv root) not looked at.
    """
    pyenv_shim(tmp_path / "bin" / "python3.12")
    pyenv_shim(tmp_path / "bin" / "python3.13")
    fake_python(tmp_path / "bin" / "python3", "3.11")
    fake(tmp_path / "bin" / "pyenv", f'[ "$1" = root ] && echo "{tmp_path}/my pyenv"')
    fake_python(tmp_path / "my pyenv" / "versions" / "3.11.7" / "bin" / "python", "3.11")
    wanted = fake_python(tmp_path / "my pyenv" / "versions" / "3.12.1" / "bin" / "python", "3.12")
    done = find(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{wanted}\n", "")


@pytest.mark.parametrize(
    ("versions", "wanted"),
    [
        (["3.13", "3.12"], "3.12"),
        (["3.14", "3.13"], "3.13"),
        (["3.9", "3.11", "3.14"], "3.14"),
        (["2.7", "3.2", "3.14", "3.12"], "3.12"),
    ],
)
def test_the_tested_version_wins(tmp_path: Path, versions: list[str], wanted: str) -> None:
    """3.12 before 3.13 before newer ones, wherever they are (the first one here: on PATH).

    Catches: the first that fits being taken.
    """
    fake_python(tmp_path / "bin" / "python3", versions[0])
    for name in versions[1:]:
        fake_python(tmp_path / "home" / ".pyenv" / "versions" / name / "bin" / "python", name)
    assert find(tmp_path).stdout == f"{tmp_path}/home/.pyenv/versions/{wanted}/bin/python\n"


def test_the_path_printed_is_the_interpreters_own(tmp_path: Path) -> None:
    """Catches: printing the shim, which works only in folders where pyenv's version is switched on."""
    fake_python(tmp_path / "bin" / "python3", "3.12", says=tmp_path / "real python")
    assert find(tmp_path).stdout == f"{tmp_path}/real python\n"


def test_uv_is_asked_last(tmp_path: Path) -> None:
    """Catches: uv not asked, or its answer not run."""
    wanted = fake_python(tmp_path / "uv" / "python", "3.13")
    fake(tmp_path / "bin" / "uv", f'[ "$1 $2 $3" = "python find >=3.12" ] && echo "{wanted}"')
    assert find(tmp_path).stdout == f"{wanted}\n"


def test_none_found_is_one_line(tmp_path: Path) -> None:
    """Catches: exit status 0, no word on what to install, noise from failing candidates."""
    pyenv_shim(tmp_path / "bin" / "python3.12")
    fake_python(tmp_path / "bin" / "python3", "3.11")
    fake(tmp_path / "bin" / "uv", "echo 'error: no interpreter' >&2; exit 2")
    done = find(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no Python >= 3.12") and "apt install" in done.stderr


def test_make_stops_where_no_python_is(tmp_path: Path) -> None:
    """`make install` prints that line and makes no environment. Catches: make going on with an empty name."""
    make = next(
        Path(folder) / "make" for folder in os.environ["PATH"].split(":") if (Path(folder) / "make").exists()
    )
    for tool in ("sh", "echo"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(Path("/bin") / tool)
    command = [str(make), "install", f"VENV={tmp_path}/venv"]
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "error: no Python >= 3.12" in done.stderr and "installing" not in done.stdout
    assert not (tmp_path / "venv").exists()


def setup_keywords() -> dict[str, object]:
    """Return the literal keywords of setup.py's call, without running it."""
    call = ast.parse((ROOT / "setup.py").read_text()).body[-1]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    literals: dict[str, object] = {}
    for keyword in call.value.keywords:
        if keyword.arg is not None and keyword.arg != "packages":
            literals[keyword.arg] = ast.literal_eval(keyword.value)
    return literals


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs)
    return {normalised(name): pinned for name, pinned in pairs}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_satisfy_setup() -> None:
    """Catches: a requirement without a tested version, a pin outside the range, local or editable pins."""
    keywords, pins = setup_keywords(), constraints()
    required = [
        Requirement(text) for text in keywords["install_requires"] + keywords["extras_require"]["dev"]
    ]
    assert len(required) > 9
    for requirement in required:
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
    assert not [pin for pin in pins.values() if "+" in pin or "@" in pin or "/" in pin]


def test_this_environment_is_the_pinned_one() -> None:
    """The installed versions are those of the constraints. Catches: tests run on versions nobody gets."""
    # setuptools, once it is imported, puts older copies of some packages of its own on the path
    path = [folder for folder in sys.path if "_vendor" not in folder]
    installed = {normalised(found.name): found.version for found in distributions(path=path)}
    wanted = constraints()  # those that are not here are pins for another platform
    differing = {
        name: (installed[name], pinned)
        for name, pinned in wanted.items()
        if installed.get(name, pinned) != pinned
    }
    assert installed.keys() & wanted.keys()
    assert not differing


def test_nvidias_apex_is_never_a_dependency() -> None:
    """The package index's `apex` is another project. Catches: it named in setup.py or the constraints."""
    keywords = setup_keywords()
    extras = [text for texts in keywords["extras_require"].values() for text in texts]
    assert "apex" not in {Requirement(text).name.lower() for text in keywords["install_requires"] + extras}
    assert "apex" not in constraints()


def test_the_image_keeps_its_own_builds_and_pins_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the Dockerfile's program on what a container of NVIDIA's holds. Catches: a torch, Triton or
    CUDA wheel of the package index in the image, a requirement without a version."""
    (program,) = re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON\n", (ROOT / "Dockerfile").read_text(), re.DOTALL)
    builds = {"torch": "2.11.0a0+abc.nv26.03", "triton": "3.6.0", "transformer_engine": "2.13.0+xyz"}
    others = {"wandb": "0.1", "apex": "0.1"}
    container = [SimpleNamespace(name=name, version=version) for name, version in (builds | others).items()]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: container)
    monkeypatch.chdir(ROOT)
    exec(program.replace("/tmp/versions.txt", str(tmp_path / "versions.txt")), {})
    pairs = [line.split("==") for line in (tmp_path / "versions.txt").read_text().splitlines()]
    versions = {normalised(name): version for name, version in pairs}
    assert len(versions) == len(pairs)
    assert builds.items() <= {name.replace("-", "_"): version for name, version in versions.items()}.items()
    assert versions["wandb"] == constraints()["wandb"]
    assert not [name for name in versions if name.startswith(("nvidia-c", "cuda-"))]
    keywords = setup_keywords()
    extras = keywords["extras_require"]
    needed = [Requirement(text) for text in keywords["install_requires"] + extras["dev"] + extras["eval"]]
    assert {normalised(requirement.name) for requirement in needed} <= versions.keys()
