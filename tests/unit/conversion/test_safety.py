"""What a conversion leaves behind when it is killed, cannot go on, or is given something hostile."""

import errno
import io
import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dms import files
from megatron_dms.conversion import CheckpointError, checkpoint_args, export_hf, import_hf
from megatron_dms.conversion.hf_folder import HFFolder
from tests.support.hf_checkpoints import make_llama, make_qwen3
from tests.support.tools import ROOT, run_python

KILLS = 24  # of each conversion


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make hf (Llama in three files), megatron (hf, imported) and old (Qwen3); no test changes them."""
    folder = tmp_path_factory.mktemp("inputs")
    make_llama(folder / "hf", torch.bfloat16)
    make_qwen3(folder / "old", torch.bfloat16)
    import_hf(folder / "hf", folder / "megatron")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(read: Callable[[Path], object], folder: Path) -> bool:
    try:
        read(folder)
    except (ValueError, OSError):  # transformers raises either, a CheckpointError is the first
        return True
    return False


def killed_after(seconds: float, conversion: Callable[[], object]) -> bool:
    """Run a conversion in a forked process and kill -9 that process; return False if it had ended before.

    A fork, because starting Python and torch 48 times would take minutes.
    """
    pid = os.fork()
    if pid == 0:
        try:
            conversion()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("command", ["import", "export"])
def test_kill_minus_9_at_random_moments(command: str, inputs: Path, tmp_path: Path) -> None:
    """Catches: config.json or the tracker before the weights, an old output removed before the new one has
    its place, writing in place, leftovers under another name.
    """
    from transformers import AutoConfig

    out, old, new = (tmp_path / name for name in ("out", "old", "new"))

    def convert(target: Path, force: bool = False) -> None:
        if command == "import":
            import_hf(inputs / "hf", target, force)
        else:
            export_hf(inputs / "megatron", target, force=force)

    import_hf(inputs / "old", old) if command == "import" else shutil.copytree(inputs / "old", old)
    begin = time.monotonic()
    convert(new)
    duration = time.monotonic() - begin
    whole = [files_of(new), files_of(old)]
    rng = random.Random(1)
    kills = unfinished = 0
    for number in range(KILLS):
        force = number % 2 == 1
        shutil.rmtree(out, ignore_errors=True)
        if force:
            shutil.copytree(old, out)
        kills += killed_after(rng.uniform(0, 1.5 * duration), lambda force=force: convert(out, force))
        assert files_of(out) in whole if out.exists() else not force
        for left in set(tmp_path.iterdir()) - {out, old, new}:
            assert left.name.startswith("out.partial-") and left in files.leftovers(out)
            if files_of(left) not in whole:
                unfinished += 1
                readers = (HFFolder, checkpoint_args, AutoConfig.from_pretrained)
                assert all(refused(read, left) for read in readers), sorted(files_of(left))
            shutil.rmtree(left)
    print(f"{kills} of {KILLS} killed, {unfinished} of them left an unfinished folder")
    assert kills >= 10 and unfinished >= 3  # or the moments were chosen badly


def test_an_old_output_changes_places_in_one_step_or_is_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a moment without any output where the system can avoid it; the old one lost where not; an old
    output of which a kill leaves config.json but half of its weights.
    """
    rmtree = shutil.rmtree

    def remove(folder: Path, **options: object) -> None:
        assert not list(folder.glob("config.json"))
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    renames = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: (renames.append(b), rename(a, b))[1])
    for exchange in (True, False):
        if not exchange:
            monkeypatch.setattr(files, "_RENAME_EXCHANGE", 1 << 30)  # EINVAL, as of old file systems
        target = tmp_path / f"out_{exchange}"
        target.mkdir()
        (target / "config.json").touch()
        renames.clear()
        with files.staged_folder(target, force=True) as out:
            (out / "new").touch()
        assert [path.name for path in target.iterdir()] == ["new"]
        assert len(renames) == (0 if exchange else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out_False", "out_True"]


@pytest.mark.parametrize("kind", ["same", "a link to it", "a link is read", "inside", "around"])
def test_an_output_that_overlaps_its_input_is_refused(kind: str, inputs: Path, tmp_path: Path) -> None:
    """Catches: --force replacing the very files that are read (`resolve` gone: the link)."""
    for name, convert in (("hf", import_hf), ("megatron", export_hf)):
        source = tmp_path / name / "source"
        shutil.copytree(inputs / name, source)
        (tmp_path / f"link_{name}").symlink_to(source)
        target = {
            "same": source,
            "a link is read": source,
            "a link to it": tmp_path / f"link_{name}",
            "inside": source / "below" / "it",
            "around": source.parent,
        }[kind]
        before = files_of(source)
        with pytest.raises(CheckpointError, match="the input"):
            convert(tmp_path / f"link_{name}" if kind == "a link is read" else source, target, force=True)
        assert files_of(source) == before and not list(tmp_path.glob("**/*.partial-*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: no look at the free space; ENOSPC half-way that leaves a folder, or its new parents."""
    target = tmp_path / "new" / "out"
    usage = shutil.disk_usage(tmp_path)
    for convert, source in ((import_hf, "hf"), (export_hf, "megatron")):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
            with pytest.raises(CheckpointError, match=r"disk full: .* needs 0.00 GB"):
                convert(inputs / source, target)
        assert not list(tmp_path.iterdir())

        def full(done: int, total: int, *sizes: int) -> None:
            if done > total // 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(CheckpointError, match=r"disk full: .*No space left on device"):
            convert(inputs / source, target, progress=full)
        assert not list(tmp_path.iterdir())


def test_the_command_line_reports_limits_leftovers_and_interrupts_in_one_line(
    inputs: Path, tmp_path: Path
) -> None:
    """Catches: a traceback for a write error of the system's own, or for Ctrl-C; a leftover not mentioned,
    or removed in silence; progress without bytes and time left.
    """
    left = tmp_path / "out.partial-4194305"  # above the largest process id
    left.mkdir()
    tool = ["import", "--hf", str(inputs / "hf"), "--megatron", str(tmp_path / "out")]
    start = f"import sys, runpy; sys.argv = {[str(ROOT / 'tools' / 'convert.py'), *tool]!r}\n"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    interrupt = (
        "from megatron_dms.conversion import convert\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "convert.write = stop\n"
    )
    end = "runpy.run_path(sys.argv[0], run_name='__main__')"
    for before, status, line in ((limit, 2, "error: disk full"), (interrupt, 130, "interrupted")):
        done = run_python("-B", "-c", start + before + end)  # a .pyc is a file with a limit, too
        assert done.error.count("\n") == 2, done.error
        note, last = done.errors
        assert done.status == status and last.startswith(line) and str(left) in note
        assert [path.name for path in tmp_path.iterdir()] == [left.name]


def test_values_that_are_not_finite_are_counted_and_kept(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Catches: a scan that misses -inf or NaN, that counts tensors for values, or bits that change."""
    source = tmp_path / "hf"
    shutil.copytree(inputs / "hf", source)
    bad = {"model.layers.0.mlp.up_proj.weight": 3, "model.norm.weight": 1}
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in bad.keys() & tensors.keys():
            tensors[name].view(-1)[: bad[name]] = torch.tensor([-torch.inf, torch.nan, torch.inf])[
                : bad[name]
            ]
        save_file(tensors, file, metadata={"format": "pt"})
    steps: list[tuple[int, ...]] = []
    report = import_hf(source, tmp_path / "megatron", progress=lambda *step: steps.append(step))
    assert report.non_finite == bad
    assert steps[-1] == (report.tensors, report.tensors, report.bytes, report.bytes)
    assert export_hf(tmp_path / "megatron", tmp_path / "back").non_finite == bad
    assert files_of(tmp_path / "back") == files_of(source)


def test_a_hostile_pickle_runs_nothing(inputs: Path, tmp_path: Path) -> None:
    """Catches: `.metadata` read by plain pickle.load, as DCP does, or classes admitted by module alone."""

    class Hostile:
        def __init__(self, *call: object) -> None:
            self.call = call

        def __reduce__(self) -> tuple:
            return self.call[0], self.call[1:]

    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    ran = tmp_path / "ran"
    for call in ((os.system, f"touch {ran}"), (eval, f"open({str(ran)!r}, 'w')"), (FileSystemWriter, ran)):
        folder = tmp_path / "megatron"
        shutil.copytree(inputs / "megatron", folder)
        path = folder / "release" / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = Hostile(*call)
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="has no place there"):
            export_hf(folder, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
        shutil.rmtree(folder)


class Scripted(torch.nn.Module):
    """A program that runs when it is loaded."""

    @torch.jit.export
    def __getstate__(self) -> int:
        return 1

    @torch.jit.export
    def __setstate__(self, state: int) -> None:
        print("code of the checkpoint ran")
        self.training = False

    def forward(self, x: int) -> int:
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_in_the_place_of_the_arguments_is_refused(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Catches: torch.load handing an archive with TorchScript in it to the interpreter of that."""
    folder = tmp_path / "megatron"
    shutil.copytree(inputs / "megatron", folder)
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    (index,) = [index for index in metadata.storage_data if index.fqn.startswith("common_state")]
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(Scripted()), program)
    (folder / "release" / "extra.distcp").write_bytes(program.getvalue())
    place = metadata.storage_data[index]
    place.relative_path, place.offset, place.length = "extra.distcp", 0, len(program.getvalue())
    path.write_bytes(pickle.dumps(metadata))
    capfd.readouterr()
    with pytest.raises(CheckpointError, match="TorchScript"):
        export_hf(folder, tmp_path / "out")
    assert "ran" not in capfd.readouterr().out


def test_pickled_weights_and_wrong_headers_are_refused(inputs: Path, tmp_path: Path) -> None:
    """Catches: a .bin read by torch.load; offsets of a header believed, so that tensors overlap."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(inputs / "hf" / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even looked at")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*safetensors format first"):
        import_hf(folder, tmp_path / "out")
    shutil.copy(inputs / "old" / "model.safetensors", folder)
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = (name for name in list(header)[1:3])
    (begin, middle), (_, end) = (header[name]["data_offsets"] for name in (first, second))
    for places in (
        ([begin, middle], [begin, middle]),  # overlapping
        ([begin, middle + 4], [middle + 4, end]),  # not of the shapes' sizes
        ([begin, middle], [-1, 5]),
        ([begin, middle], "ab"),
        ([begin, middle], None),
    ):
        header[first]["data_offsets"], header[second]["data_offsets"] = places
        text = json.dumps(header).encode()
        rest = len(text).to_bytes(8, "little") + text + content[8 + length :]
        (folder / "model.safetensors").write_bytes(rest)
        with pytest.raises(CheckpointError, match=r"wrong place|damaged"):
            HFFolder(folder)
