"""What surrounds Megatron's saving and loading, as far as one rank can show it."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_dms.conversion import CheckpointError
from megatron_dms.resilience import verified_saves
from megatron_dms.resilience.ownership import Owner
from megatron_dms.resilience.run_folder import iteration_name
from megatron_dms.resilience.watchdog import SAVE
from tests.support.run_folders import DATA, save_one


class Phases:
    """A watchdog that only records the phases."""

    def __init__(self) -> None:
        self.now: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.now = name
        yield
        self.now = None


@pytest.mark.parametrize(("blocking", "phase"), [(True, SAVE), (False, None)])
def test_waiting_for_an_asynchronous_save_is_a_save(blocking: bool, phase: str | None) -> None:
    """Catches: the step's limit for a wait as long as a save, and a step that is never under its limit."""
    watchdog, seen = Phases(), []
    around = verified_saves.Checkpoints(0, False, watchdog)
    around._megatron.finalize = lambda **named: seen.append((named, watchdog.now))
    around.finalize(blocking=blocking, terminate=True)
    assert seen == [({"blocking": blocking, "terminate": True}, phase)]


def test_a_run_that_has_lost_its_folder_saves_nothing(tmp_path: Path) -> None:
    """Catches: an owner that is asked only at one end of a save, or after the folders of killed runs, among
    which are those of the new owner, have been removed."""
    staged = tmp_path / "unfinished-of-the-new-owner"
    staged.mkdir()
    around = verified_saves.Checkpoints(0, False, Phases(), Owner.claim(tmp_path))
    save = verified_saves._Save(4, tmp_path, around._new_staging(tmp_path))
    assert not staged.exists()
    staged.mkdir()
    Owner.claim(tmp_path)
    around._saved_before = False
    with pytest.raises(CheckpointError, match="another run has taken the folder over"):
        around._new_staging(tmp_path)
    assert staged.is_dir()
    save_one(save.staging, 4)
    with pytest.raises(CheckpointError, match="another run has taken the folder over"):
        around._publish(save, {})
    assert not (tmp_path / iteration_name(4)).exists()


def test_what_is_missing_is_looked_at_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another machine wrote shows up later. Catches: a good checkpoint set aside at once, one
    that stays damaged taken for good, half a minute lost on what is known."""
    for iteration in (2, 4):
        save_one(tmp_path, iteration)
    file = tmp_path / iteration_name(4) / DATA
    file.rename(tmp_path / "late")
    waited: list[float] = []
    monkeypatch.setattr(verified_saves.time, "sleep", waited.append)
    iteration, passed = verified_saves._look(tmp_path, {})
    assert iteration == 2 and list(passed) == [4] and len(waited) == 1
    monkeypatch.setattr(verified_saves.time, "sleep", lambda seconds: (tmp_path / "late").rename(file))
    assert verified_saves._look(tmp_path, {}) == (4, {})
    monkeypatch.setattr(verified_saves.time, "sleep", waited.append)
    assert verified_saves._look(tmp_path, {4: "known"}) == (2, {4: "known"}) and len(waited) == 1


def test_arguments_of_a_damaged_checkpoint_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: another model trained in silence, as its description was read before the damage was seen."""
    described = Namespace(num_layers=4, layernorm_epsilon=1e-6, vocab_size=131)
    monkeypatch.setattr(verified_saves, "checkpoint_args", lambda save, iteration: described)
    verified_saves._check_described(Namespace(**vars(described)), Path("run"), 4)
    wrong = Namespace(**vars(described) | {"layernorm_epsilon": 1e-5})
    with pytest.raises(
        CheckpointError, match="described another model than iteration 4 of run does: start the"
    ):
        verified_saves._check_described(wrong, Path("run"), 4)
