"""Which checkpoint a run resumes from, whatever happened to the files.

The checkpoints are small and made without Megatron.
"""

import errno
import os
import shutil
from pathlib import Path

import pytest

from megatron_dms import files
from megatron_dms.conversion import CheckpointError
from megatron_dms.formats import checksums
from megatron_dms.formats.checksums import MANIFEST
from megatron_dms.formats.megatron_folder import TRACKER
from megatron_dms.resilience import run_folder
from megatron_dms.resilience.resume_check import compare
from megatron_dms.resilience.run_folder import finished_iterations, iteration_name, resume_point
from megatron_dms.training.startup import _newest_readable
from tests.support.run_folders import DATA, save_one, staged, sums


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """Make a run with checkpoints 2, 4 and 6."""
    for iteration in (2, 4, 6):
        save_one(tmp_path / "run", iteration)
    return tmp_path / "run"


def test_the_pointer_decides(save: Path) -> None:
    """The pointer decides even if somebody set it back by hand. Catches: the newest folder taken, of a
    course of the run that was given up, at once or once the one pointed to is damaged; and a verdict about
    a run that has none."""
    assert resume_point(save) == (6, {})
    (save / TRACKER).write_text("4\n")
    assert resume_point(save) == (4, {})
    truncate(save / iteration_name(4))
    assert resume_point(save)[0] == 2
    assert resume_point(save / "nowhere") == (None, {})


@pytest.mark.parametrize("torn", ["", "garbage", "-3", None])
def test_a_torn_pointer_is_healed_by_the_newest_finished_checkpoint(save: Path, torn: str | None) -> None:
    """Catches: a run that starts anew, or not at all, because this one small file is empty or gone."""
    if torn is None:
        (save / TRACKER).unlink()
    else:
        (save / TRACKER).write_text(torn)
    iteration, passed = resume_point(save)
    assert iteration == 6 and list(passed) == [-1] and TRACKER in passed[-1]


def truncate(folder: Path) -> str:
    os.truncate(folder / DATA, 100)
    return f"{DATA} has 100 bytes, expected "


def lose_a_file(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return ".metadata is missing"


def flip_a_checksum(folder: Path) -> str:
    text = (folder / MANIFEST).read_text()
    place = text.index('"sha256": "') + 12
    (folder / MANIFEST).write_text(text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :])
    return f"{MANIFEST} is damaged (ValueError: its own checksum does not match)"


def tear_the_checksums(folder: Path) -> str:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])
    return f"{MANIFEST} is damaged"


def lose_all(folder: Path) -> str:
    shutil.rmtree(folder)
    return "iter_0000006 is missing"


@pytest.mark.parametrize("damage", [truncate, lose_a_file, flip_a_checksum, tear_the_checksums, lose_all])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(save: Path, damage) -> None:
    """Catches: damage that only loading finds, or that is blamed on another file."""
    expected = damage(save / iteration_name(6))
    iteration, passed = resume_point(save)
    assert iteration == 4 and list(passed) == [6] and expected in passed[6]


def test_a_flipped_bit_changes_the_checksum_of_its_file(save: Path) -> None:
    """Catches: a checksum of part of a file, or of its length."""
    folder = save / iteration_name(6)
    expected = checksums.read_manifest(folder)
    content = bytearray((folder / DATA).read_bytes())
    content[-1] ^= 0x80
    (folder / DATA).write_bytes(content)
    wrong = checksums.differences(folder, sums(folder), expected)
    assert list(wrong) == [DATA] and "sha256" in wrong[DATA]
    assert resume_point(save, {6: wrong[DATA]}) == (4, {6: wrong[DATA]})


def test_one_that_does_not_describe_itself_is_passed_over_at_the_start(save: Path) -> None:
    """The sizes of the checkpoint are right, and its checksums are compared later. Catches: a run that
    ends there at each start."""
    for iteration, content in ((6, bytes), (4, lambda size: b"\x80\x05}" + bytes(size - 3))):
        path = save / iteration_name(iteration) / ".metadata"
        path.write_bytes(content(path.stat().st_size))
    found = _newest_readable(save, 6)
    assert found.iteration_folder.name == iteration_name(2) and found.iteration == 2
    path = save / iteration_name(2) / ".metadata"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match="no checkpoint left to go on from"):
        _newest_readable(save, 6)


def test_what_cannot_be_read_differs(save: Path) -> None:
    """Catches: a disk that fails to read taken for an end of the run, and not for damage."""
    folder = save / iteration_name(6)
    found = sums(folder) | {DATA: "Input/output error"}
    wrong = checksums.differences(folder, found, checksums.read_manifest(folder))
    assert wrong == {DATA: f"{folder / DATA} cannot be read: Input/output error"}


def test_nothing_left_is_an_error_and_no_new_start(save: Path) -> None:
    """Catches: a run whose progress is damaged and that begins anew without a word."""
    for iteration in (2, 4, 6):
        truncate(save / iteration_name(iteration))
    with pytest.raises(CheckpointError, match="no checkpoint left to go on from") as error:
        resume_point(save)
    assert all(iteration_name(iteration) in str(error.value) for iteration in (2, 4, 6))


def test_a_checkpoint_without_checksums_is_used_where_the_pointer_names_it(save: Path) -> None:
    """An earlier version wrote such checkpoints. Catches: old runs that cannot go on; an unfinished folder
    of theirs taken."""
    (save / iteration_name(6) / MANIFEST).unlink()
    assert resume_point(save) == (6, {})
    (save / TRACKER).write_text("")
    assert resume_point(save)[0] == 4


def test_set_aside_keeps_the_bytes_and_a_second_one_too(save: Path) -> None:
    """Catches: damaged checkpoints that overwrite each other or stay in the way."""
    for number, name in ((1, "damaged_iter_0000006"), (2, "damaged_iter_0000006_2")):
        content = (save / iteration_name(6) / DATA).read_bytes()
        aside = run_folder.set_aside(save, 6)
        assert aside == save / name and (aside / DATA).read_bytes() == content
        save_one(save, 6, value=float(number))
    assert run_folder.set_aside(save, 99) is None


@pytest.mark.parametrize("stopped_at", range(8))
def test_a_save_that_stops_anywhere_leaves_the_one_before_or_the_new_one(
    save: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """The disk is full at each flush in turn. Catches: a pointer before the checkpoint is in its place, an
    old one removed before the new one is pointed to, a half-written folder under a finished one's name."""
    calls, flush = 0, os.fsync

    def full(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls > stopped_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(file)

    folder = staged(save, 8, value=8.0)
    found = sums(folder)
    monkeypatch.setattr(files.os, "fsync", full)
    try:
        run_folder.finish(folder, save, 8, found)
        run_folder.remove_old(save, 2, 8, folder.parent)
    except OSError:
        assert calls == stopped_at + 1
    else:
        assert calls == stopped_at == 7  # every flush had its turn
    monkeypatch.setattr(files.os, "fsync", flush)
    iteration, passed = resume_point(save)
    assert passed == {} and iteration == (8 if calls > 4 else 6)
    assert {6, iteration} <= set(finished_iterations(save))
    for there in finished_iterations(save):
        checksums.check_sizes(save / iteration_name(there))
    run_folder.new_staging(save, clean=True)
    save_one(save, 8, value=8.0)
    assert resume_point(save) == (8, {}) and len(list(save.glob("unfinished-*"))) == 1


def test_a_stale_checkpoint_is_replaced_as_a_whole(save: Path) -> None:
    """Iteration 6 of a course that was given up has one file more. Catches: files of both mixed."""
    (save / TRACKER).write_text("4")
    (save / iteration_name(6) / "__7_0.distcp").write_bytes(b"of another layout")
    save_one(save, 6, value=7.0)
    folder = save / iteration_name(6)
    assert resume_point(save) == (6, {}) and "__7_0.distcp" not in os.listdir(folder)
    assert compare(folder, save / iteration_name(4)) == (1, ["w"])


def test_keep_counts_what_was_verified_and_no_more(save: Path) -> None:
    """Catches: the newest removed, one too many or too few, what is not finished or not ours removed."""
    (save / "release").mkdir()
    run_folder.set_aside(save, 2)
    save_one(save, 2)
    (save / TRACKER).write_text("6")
    save_one(save, 8, keep=3)
    assert sorted(finished_iterations(save)) == [4, 6, 8]
    save_one(save, 10, keep=1)
    assert finished_iterations(save) == [10]
    assert {"release", "damaged_iter_0000002"} <= set(os.listdir(save))


def test_files_that_do_not_fit_together_are_no_checkpoint(save: Path) -> None:
    """Catches: a checksum of a truncated file, written as if all were well."""
    folder = staged(save, 8)
    os.truncate(folder / DATA, 50)
    with pytest.raises(CheckpointError, match="truncated"):
        run_folder.finish(folder, save, 8, sums(folder))
    folder = staged(save, 8)
    found = sums(folder)
    del found[".metadata"]
    with pytest.raises(CheckpointError, match=r"\.metadata appeared or vanished"):
        run_folder.finish(folder, save, 8, found)
    assert resume_point(save) == (6, {})


def test_shares_are_equal_and_complete() -> None:
    """Catches: a file that no rank reads, or two; one rank that reads everything."""
    sizes = {f"f{number}": 10 * number for number in range(12)} | {"big": 500}
    parts = checksums.shares(sizes, 4)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    assert ["big"] in parts
    assert max(sum(sizes[name] for name in part) for part in parts if part != ["big"]) <= 230
    assert checksums.shares(sizes, 4) == parts == checksums.shares(dict(reversed(sizes.items())), 4)


def test_compare_sees_every_bit(tmp_path: Path) -> None:
    """Catches: NaN that differs from itself, 0 that equals -0."""
    values = {"nan": float("nan"), "again": float("nan"), "zero": 0.0, "minus": -0.0}
    folders = {name: staged(tmp_path / name, 1, value) for name, value in values.items()}
    assert compare(folders["nan"], folders["again"]) == (1, [])
    assert compare(folders["zero"], folders["minus"]) == (1, ["w"])
