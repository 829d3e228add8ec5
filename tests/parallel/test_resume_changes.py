"""A command line that is not quite that of the run so far goes on as it should, or is refused in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dms.resilience.ownership import OWNER, Owner
from tests.parallel.test_layouts import PP, TP
from tests.parallel.test_resume import HALF, saving, stopped_copy
from tests.support.comparison import TOLERANCE, assert_same_curves
from tests.support.retrofit import STEPS, Workspace, make_data

DISTRIBUTED = ("--use-distributed-optimizer",)
RESHARDABLE = (*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable")
OVERRIDE = "add --override-opt_param-scheduler"
NEW_RUN = "or start a new retrofit from these weights with --finetune and another --save"

REFUSED = {
    "TP in place of DP": (TP, "--tensor-model-parallel-size is 2, but was 1", "fully-reshardable"),
    "PP in place of DP": (PP, "--pipeline-model-parallel-size is 2, but was 1", "fully-reshardable"),
    "an undivided optimizer": ("undivided", "was saved with --use-distributed-optimizer; add it", NEW_RUN),
    "more steps": (("--train-iters", "8"), "--train-iters is 8, but was 6", OVERRIDE),
    "a larger batch": (("--global-batch-size", "8"), "--global-batch-size is 8, but was 4", "counts samples"),
    "another schedule": (("--lr-decay-style", "cosine"), "--lr-decay-style is cosine", OVERRIDE),
    "another learning rate": (("--lr", "1e-4"), "--lr is 0.0001, but was 0.0003", NEW_RUN),
    "another learning rate, overridden": (
        ("--lr", "1e-4", "--override-opt_param-scheduler"),
        "--lr is 0.0001, but was 0.0003 in the run so far",
        NEW_RUN,
    ),
    "another length": (("--seq-length", "25"), "--seq-length is 25, but was 50", "--dms-resume-on-other"),
    "another seed": (("--seed", "99"), "--seed is 99, but was 4321", "--dms-resume-on-other-samples"),
    "other data": (("--train-data-path", "OTHER"), "the training data", "--dms-resume-on-other-samples"),
}
GOES_ON = {
    "fewer processes": (1, DISTRIBUTED),
    "the same data elsewhere": (2, (*DISTRIBUTED, "--train-data-path", "COPY")),
    "more steps, with the schedule so far": (
        2,
        (*DISTRIBUTED, "--train-iters", str(STEPS + 2), "--use-checkpoint-opt_param-scheduler"),
    ),
}


@pytest.fixture(scope="module")
def run(workspace: Workspace) -> tuple[Path, dict[str, list[float]]]:
    """Train on two data-parallel ranks, with saves in the middle and at the end -> folder and curves."""
    folder = workspace.folder / "changes"
    return folder, workspace.run("changes", 2, *DISTRIBUTED, *saving(folder))


@pytest.fixture(scope="module")
def places(workspace: Workspace) -> dict[str, str]:
    """Make other data, and a copy of the data -> their prefixes."""
    other = replace(workspace)
    other.data = workspace.folder / "other_data"
    make_data(other, seed=12)
    for path in workspace.folder.glob("data*.*"):
        shutil.copy(path, workspace.folder / f"copy_of_{path.name}")
    return {"OTHER": str(other.data), "COPY": str(workspace.folder / "copy_of_data")}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_starts(
    name: str, workspace: Workspace, run: tuple[Path, object], places: dict[str, str]
) -> None:
    """Catches: Megatron's late assertion, whose line names no flag, a traceback, and a run that goes on with
    other samples than those that it says."""
    changes, *messages = REFUSED[name]
    flags = () if changes == "undivided" else (*DISTRIBUTED, *(places.get(word, word) for word in changes))
    copy = stopped_copy(run[0], workspace.folder / f"refused {name}")
    with pytest.raises(RuntimeError) as refused:
        workspace.run(f"refused {name}", 2, *flags, *saving(copy))
    said = [line for line in str(refused.value).splitlines() if "pretrain_dms.py: error: " in line]
    assert len(said) == 1 and all(message in said[0] for message in messages), refused.value
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize("name", GOES_ON)
def test_goes_on(
    name: str, workspace: Workspace, run: tuple[Path, dict[str, list[float]]], places: dict[str, str]
) -> None:
    """Catches: a checkpoint whose optimizer state belongs to a number of ranks, and data that are recognised
    by their path."""
    processes, flags = GOES_ON[name]
    folder, curves = run
    copy = stopped_copy(folder, workspace.folder / f"goes on {name}")
    words = [places.get(word, word) for word in flags]
    resumed = workspace.run(f"goes on {name}", processes, *words, *saving(copy))
    resumed = {tag: values[: STEPS - HALF] for tag, values in resumed.items()}
    assert_same_curves(resumed, curves, range(HALF, STEPS), TOLERANCE)


def test_reshardable_state_goes_on_in_any_layout(workspace: Workspace) -> None:
    """Catches: a state that is saved by parameter and loaded by rank."""
    folder = workspace.folder / "reshardable"
    curves = workspace.run("reshardable", 4, *TP, *RESHARDABLE, *saving(folder))
    copy = stopped_copy(folder, workspace.folder / "reshardable elsewhere")
    resumed = workspace.run("reshardable elsewhere", 2, *PP, *RESHARDABLE, *saving(copy))
    assert_same_curves(resumed, curves, range(HALF, STEPS), TOLERANCE)


def test_a_folder_whose_run_is_alive(workspace: Workspace) -> None:
    """Catches: two jobs of one command line that write over each other's checkpoints, and both end with 0."""
    folder = workspace.folder / "alive"
    owner = Owner.claim(folder)
    with pytest.raises(RuntimeError, match=f"still alive: process {owner.pid}"):
        workspace.run("alive", 2, *saving(folder))
    assert [path.name for path in folder.iterdir()] == [OWNER]


def test_other_samples_with_the_flag(workspace: Workspace, run: tuple[Path, object]) -> None:
    """Catches: a flag that is accepted and ignored."""
    copy = stopped_copy(run[0], workspace.folder / "other samples")
    flags = (*DISTRIBUTED, "--seed", "99", "--dms-resume-on-other-samples")
    resumed = workspace.run("other samples", 2, *flags, *saving(copy))
    assert len(resumed["KL"]) == STEPS - HALF
