"""The env file of the launch scripts, and their dry run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.launching import ROOT, SBATCH, TORCHRUN, called, launch, write_env

EXAMPLE = ROOT / "launch" / "example.env"
LINE = 4  # that of the first line which a test adds to an env file


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["GPU_PER_NODE=8"], f"my.env:{LINE}: unknown variable GPU_PER_NODE"),
        (["# fine", "", "PORT 29400"], f"my.env:{LINE + 2}: found 'PORT 29400'; expected NAME=value"),
        (["NODES=2"], f"my.env:{LINE}: NODES is set twice, first in line 2"),
        (["VENV=$HOME/venv"], f"my.env:{LINE}: VENV holds $"),
        (["export VENV=/x"], f"my.env:{LINE}: VENV is the launcher's"),
        (["SRUN_ARGS=--mem=0 \\", "  --exclusive", "TYPO=1"], f"my.env:{LINE + 2}: unknown variable TYPO"),
        (["SRUN_ARGS=--mem=0 \\"], "the last line ends in \\"),
        (["PORT=0"], "PORT is '0'; expected a whole number above 0"),
        (["DEVICE=gpu"], "DEVICE is 'gpu'; expected cuda or cpu"),
        (["PREFLIGHT=maybe"], "PREFLIGHT is 'maybe'; expected yes or no"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[str], said: str) -> None:
    """Tests both scripts. Catches: a typo that is ignored, and a line number that counts continued lines
    as one."""
    env = write_env(tmp_path, *lines)
    for script in (TORCHRUN, SBATCH):
        done = launch(tmp_path, script, env)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not called(tmp_path)


@pytest.mark.parametrize("name", ["NODES", "GPUS_PER_NODE", "TRAIN_ARGS"])
def test_a_missing_variable_is_named(tmp_path: Path, name: str) -> None:
    """Catches: one that the caller's own environment fills in, and one that is taken as empty."""
    env = write_env(tmp_path)
    env.write_text("".join(line for line in env.open() if not line.startswith(f"{name}=")))
    done = launch(tmp_path, TORCHRUN, env, **{name: "1"})
    assert done.returncode == 2 and f"{name} is missing" in done.stderr


def test_the_required_are_these() -> None:
    """The required variables are those of example.env without #. Catches: a commented line that was meant
    to be required."""
    names = re.findall(r"^([A-Z_]+)=", EXAMPLE.read_text(), re.MULTILINE)
    assert names == ["TRAIN_ARGS", "NODES", "GPUS_PER_NODE"]


def test_every_setting_has_an_effect(tmp_path: Path) -> None:
    """Catches: a variable that example.env documents and no script reads."""
    documented = set(re.findall(r"^#?([A-Z_]+)=", EXAMPLE.read_text(), re.MULTILINE))
    scripts = "".join(path.read_text() for path in (SBATCH, TORCHRUN, ROOT / "launch" / "settings.sh"))
    for name in documented:
        assert re.search(rf"\$\{{?{name}\b|for name in [A-Z_ ]*\b{name}\b", scripts), f"{name} does nothing"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["TRAIN_ARGS=--load run"], "TRAIN_ARGS has no --save DIR"),
        (["TRAIN_ARGS=--save run --load=other"], "--load is 'other', --save is 'run'"),
    ],
)
def test_a_chain_must_be_able_to_resume(tmp_path: Path, lines: list[str], said: str) -> None:
    """Catches: a job that would start anew after each requeue."""
    env = write_env(tmp_path)
    env.write_text("\n".join([*lines, "NODES=1", "GPUS_PER_NODE=1"]))
    done = launch(tmp_path, SBATCH, env)
    assert done.returncode == 2 and said in done.stderr and not called(tmp_path)


def test_the_dry_run_shows_all_and_runs_nothing(tmp_path: Path) -> None:
    """Catches: a command that is run all the same, and one, or an exported variable, that is not shown."""
    env = write_env(tmp_path, "export NCCL_DEBUG=INFO", VENV="/some/venv", CPUS_PER_TASK="32", ACCOUNT="'me'")
    done = launch(tmp_path, SBATCH, "--dry-run", env)
    assert done.returncode == 0, done.stderr
    assert not called(tmp_path) and {path.name for path in tmp_path.iterdir()} == {"my.env"}
    lines = done.stdout.splitlines()
    starts = [line.split(" ", 1)[0] for line in lines if not line.startswith(("#", "export"))]
    assert starts == ["mkdir", "sbatch", "srun", "srun", "python", "python", "scontrol"]
    exported = {
        line.split()[1].split("=")[0]: line.split("=", 1)[1] for line in lines if line[:7] == "export "
    }
    assert exported["NCCL_DEBUG"] == "INFO" and exported["OMP_NUM_THREADS"] == "16"
    assert exported["PATH"].startswith("/some/venv/bin:")
    sbatch = next(line for line in lines if line.startswith("sbatch"))
    for option in ("--signal=B:USR1@600", "--requeue", "--gpus-per-node=2", "--account=me"):
        assert f" {option} " in sbatch
    assert "--time" not in sbatch and "--partition" not in sbatch
    assert lines[-3].endswith("--exit-signal-handler --exit-signal SIGUSR1")


def test_the_dry_run_shows_what_a_job_exports(tmp_path: Path) -> None:
    """Catches: a variable set for the run behind the dry run's back (printed and real ones are compared)."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\nenv -0 >env.txt\n")
    python.chmod(0o755)
    env = write_env(tmp_path, "export SPACED=a b", VENV=str(tmp_path / "venv"), PREFLIGHT="no")
    shown = launch(tmp_path, TORCHRUN, "--dry-run", env).stdout
    assert launch(tmp_path, TORCHRUN, env).returncode == 0
    found = dict(pair.split("=", 1) for pair in (tmp_path / "env.txt").read_text().split("\0") if pair)
    assert found["SPACED"] == "a b"
    before = subprocess.run(["env", "-0"], capture_output=True, text=True).stdout
    known = {pair.split("=", 1)[0] for pair in before.split("\0")} | {"_", "SHLVL", "PWD", "OLDPWD"}
    known |= {name for name in found if name.startswith("FAKE_")}
    for name in set(found) - known | {"PATH"}:
        assert f"export {name}=" in shown, f"{name} is exported, but not shown"


def test_a_container_is_used_where_one_is_set(tmp_path: Path) -> None:
    """Catches: pyxis options without a container (srun refuses them), and a clone that is not mounted."""
    plain = launch(tmp_path, SBATCH, "--dry-run", write_env(tmp_path))
    assert "--container" not in plain.stdout
    env = write_env(tmp_path, CONTAINER_IMAGE="nvcr.io#x:1", CONTAINER_MOUNTS="/a:/b")
    lines = launch(tmp_path, SBATCH, "--dry-run", env).stdout.splitlines()
    for line in (line for line in lines if line.startswith("srun")):
        assert " --container-image=nvcr.io#x:1 " in line
        assert f"--container-mounts=/a:/b\\,{ROOT}:{ROOT}\\,{tmp_path}:{tmp_path} " in line


def test_submission(tmp_path: Path) -> None:
    """Catches: the log's folder missing, where SLURM would end the job without a word."""
    env = write_env(tmp_path, TIME="4:00:00", SBATCH_ARGS="--exclusive --mem=0")
    assert launch(tmp_path, SBATCH, env).returncode == 0
    (call,) = called(tmp_path)
    assert call.endswith(f"--time=4:00:00 --exclusive --mem=0 {SBATCH} --in-job {ROOT} {env}")
    assert (tmp_path / "logs").is_dir()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    scripts = [SBATCH, TORCHRUN, ROOT / "launch" / "settings.sh"]
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
