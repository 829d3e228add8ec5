"""A run that was stopped and resumed equals a run that was not stopped."""

import shutil
from pathlib import Path

import pytest

from megatron_dms.formats.megatron_folder import iteration_folder
from megatron_dms.resilience.resume_check import compare
from tests.parallel.test_layouts import PP, TP
from tests.support.comparison import TOLERANCE, assert_same_curves
from tests.support.retrofit import STEPS, Workspace

HALF = STEPS // 2
ZEROING = ("--dms-zeroing-steps", str(HALF))  # so a resumed run begins where the phase ends


@pytest.fixture(scope="module")
def uninterrupted(workspace: Workspace) -> tuple[Path, dict[str, list[float]]]:
    """Run at TP 2 x PP 2 with saves in the middle and at the end -> the folder and the curves."""
    folder = workspace.folder / "uninterrupted"
    return folder, workspace.run("uninterrupted", 4, *TP, *PP, *ZEROING, *saving(folder))


def saving(folder: Path) -> tuple[str, ...]:
    """Return the flags of a new run and of its resumption."""
    return ("--load", str(folder), "--save", str(folder), "--save-interval", str(HALF))


def stopped_copy(folder: Path, copy: Path) -> Path:
    """Copy a run's folder, as it was when the run had reached its middle."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / f"iter_{STEPS:07d}")
    (copy / "latest_checkpointed_iteration.txt").write_text(str(HALF))
    return copy


def assert_resumes(workspace: Workspace, name: str, processes: int, *flags: str) -> None:
    """Train to the end and again from the middle; assert that curves, weights and optimizer state are equal
    bit for bit."""
    folder = workspace.folder / name
    curves = workspace.run(name, processes, *flags, *saving(folder))
    copy = stopped_copy(folder, workspace.folder / f"{name}-resumed")
    resumed = workspace.run(f"{name}-resumed", processes, *flags, *saving(copy))
    assert_same_curves(resumed, curves, range(HALF, STEPS), 0.0)
    tensors, different = compare(*(iteration_folder(run, STEPS) for run in (folder, copy)))
    assert tensors > 10 and different == []


def test_resumed_equals_uninterrupted_bit_for_bit(
    workspace: Workspace, uninterrupted: tuple[Path, dict[str, list[float]]]
) -> None:
    """Curves and final weights are compared at TP 2 x PP 2. Catches optimizer or data state that is not
    restored, noise from a random state, and a retrofit that starts its schedule anew."""
    folder, curves = uninterrupted
    copy = stopped_copy(folder, workspace.folder / "resumed")
    resumed = workspace.run("resumed", 4, *TP, *PP, *ZEROING, *saving(copy))
    assert_same_curves(resumed, curves, range(HALF, STEPS), 0.0)
    tensors, different = compare(*(iteration_folder(run, STEPS) for run in (folder, copy)))
    assert tensors > 20 and different == []  # optimizer state too


def test_finished_run_validates_as_what_it_is(
    workspace: Workspace, uninterrupted: tuple[Path, dict[str, list[float]]]
) -> None:
    """A finished run that is started once more trains nothing and validates the retrofitted model. Catches an
    iteration that only the training loop knows: the validation would be that of the zeroing phase."""
    folder, _ = uninterrupted
    validation = ("--eval-iters", "1", "--valid-data-path", str(workspace.data))
    curves = workspace.run("finished", 1, *ZEROING, *saving(folder), *validation)
    assert "KL" not in curves
    (target,) = set(curves["target CR validation"])
    assert target == pytest.approx(STEPS - HALF)  # steps_per_cr is 1, and the last step's number is STEPS - 1


def test_resumed_in_another_layout_continues_the_curve(
    workspace: Workspace, uninterrupted: tuple[Path, dict[str, list[float]]]
) -> None:
    """One process resumes a run at TP 2 x PP 2. Catches weights or optimizer state that are saved by rank."""
    folder, curves = uninterrupted
    copy = stopped_copy(folder, workspace.folder / "elsewhere")
    resumed = workspace.run("elsewhere", 1, *ZEROING, *saving(copy))
    assert_same_curves(resumed, curves, range(HALF, STEPS), TOLERANCE)
