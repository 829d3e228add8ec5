"""A fault ends a real run in bounded time, with a line that names rank, step and cause."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_dms.formats.megatron_folder import TRACKER
from megatron_dms.resilience.watchdog import EXIT
from tests.support.faults import Ended, run_with
from tests.support.offline_wandb import synced
from tests.support.retrofit import Workspace

AT = 4  # the step with the fault
NOTHING = "def before(*_): pass"
HANG = f"""
def before(rank, step, microbatch, model):
    if (rank, step) == (1, {AT}):
        time.sleep(1000)
"""
KILL = f"""
def before(rank, step, microbatch, model):
    if (rank, step) == (1, {AT}):
        time.sleep(4)  # a heartbeat
        os.kill(os.getpid(), 9)
"""
NAN = f"""
def before(rank, step, microbatch, model):
    if (rank, step) == (1, {AT}):
        next(p for p in model.parameters() if p.requires_grad).main_grad[0] = float("nan")
"""
CUT_SHORT = """
def before(rank, step, microbatch, model):
    if (rank, step) == (1, 2):
        os.truncate({path!r}, 100)
"""


def test_a_hanging_rank(workspace: Workspace, tmp_path: Path) -> None:
    """Rank 0 waits in a collective. Catches: steps that do not reach the watchdog, blame on the waiting rank,
    a status that torchrun turns into 1."""
    ended = run_with(HANG, workspace, tmp_path, 2, "--dms-step-limit", "20")
    assert ended.status == EXIT
    line = ended.line("pretrain_dms.py: watchdog: ")
    assert "rank 1 (" in line.split("limit 20 s: ")[1] and "sitecustomize.py" in line
    for rank in range(2):
        ended.line(f"stacks of rank {rank} (")


def test_a_lost_peer(workspace: Workspace, tmp_path: Path) -> None:
    """Catches: survivors that do not say who died, or say that a data loader's worker did."""
    ended = run_with(KILL, workspace, tmp_path, 2)
    assert ended.status == 128 + 9
    line = ended.line("pretrain_dms.py: watchdog: ")
    assert "rank 1 (" in line and "is lost" in line and f"was in step {AT}, training step" in line
    assert "DataLoader worker" not in ended.log


def test_a_dead_data_file(workspace: Workspace, tmp_path: Path) -> None:
    """The file is cut short while a data loader's worker reads it. Catches: a memory map, which dies of a bus
    error without a word, and an error that stays in the worker."""
    for path in workspace.folder.glob("data*"):
        shutil.copy(path, tmp_path)
    data = tmp_path / "data"
    fault = CUT_SHORT.format(path=f"{data}.bin")
    flags = ("--train-data-path", str(data), "--train-iters", "200")
    ended = run_with(fault, Workspace(workspace.folder), tmp_path, 2, *flags)
    assert ended.status == 1
    lines = [line for line in ended.log.splitlines() if line.startswith("pretrain_dms.py: error: rank ")]
    assert any(f"DataError: {data}.bin: found " in line and "cut short" in line for line in lines), ended.log
    assert all(", training step: " in line for line in lines)


@pytest.fixture(scope="module")
def crashed(
    workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Ended, Path, tuple[str, ...]]:
    """Run until a NaN at step 4, after a checkpoint of step 2 -> how the run ended, its folder, its flags."""
    folder = tmp_path_factory.mktemp("crashed")
    flags = logging_to(folder / "save")
    return run_with(NAN, workspace, folder, 2, *flags), folder, flags


def logging_to(save: Path) -> tuple[str, ...]:
    """Return the flags of a run that saves and logs in a folder, and resumes from it."""
    wandb = ("--wandb-project", "tests", "--wandb-exp-name", "one")
    return ("--load", str(save), "--save", str(save), "--save-interval", "2", *wandb)


def test_a_nan_in_one_gradient(crashed: tuple[Ended, Path, tuple[str, ...]]) -> None:
    """Catches: a NaN that reaches the weights, and one whose rank is not named."""
    ended, folder, _ = crashed
    assert ended.status == 1
    line = ended.line("pretrain_dms.py: error: rank 1 (")
    assert f"step {AT}, training step: " in line and "found NaN in local grad norm" in line
    assert (folder / "save" / TRACKER).read_text().strip() == "2"


def test_logs_of_an_interrupted_run_are_those_of_an_uninterrupted_one(
    workspace: Workspace, crashed: tuple[Ended, Path, tuple[str, ...]], tmp_path: Path
) -> None:
    """Both logs are read: metrics.jsonl and the only W&B run, which is offline. The flags ask for neither
    TensorBoard nor a W&B id. Catches: steps that are logged twice, points beyond the resumed step, a second
    run, a mirror that lacks a scalar or is not told of the resumption."""
    _, folder, flags = crashed
    before = [
        json.loads(line)["step"] for line in (folder / "save" / "metrics.jsonl").read_text().splitlines()
    ]
    assert before == [1, 2, 3]
    assert run_with(NOTHING, workspace, folder, 2, *flags).status == 0
    whole = run_with(NOTHING, workspace, tmp_path, 2, *logging_to(tmp_path / "save"))
    assert whole.status == 0
    whole.line("optimizer: torch's AdamW")
    resumed, expected = (lines_of(run / "save" / "metrics.jsonl") for run in (folder, tmp_path))
    assert resumed == expected and [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    assert {"KL", "loss", "learning-rate", "grad-norm"} <= expected[0].keys()

    (run, history), *others = synced(folder).items()
    assert not others and run == (folder / "save" / "wandb_run_id").read_text().strip()
    points = [row for row in history if "KL" in row]
    assert [row["_step"] for row in points] == [1, 2, 3, 4, 5, 6]
    assert [row["KL"] for row in points] == [line["KL"] for line in expected]


def lines_of(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics file without their times of day."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]
