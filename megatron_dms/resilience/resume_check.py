"""Does a killed run end where an uninterrupted one does, bit for bit? Used by tools/verify_resume.py.

One run goes to its end. The ranks of another run are killed (-9) again and again, at random moments and while
they save, and the run is started again each time by the same command. Then every tensor of the two last
checkpoints is compared, weights and optimizer state.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_dms.command_line import say
from megatron_dms.errors import CheckpointError
from megatron_dms.formats.megatron_folder import TRACKER
from megatron_dms.formats.torch_dist import Reader
from megatron_dms.resilience.run_folder import UNFINISHED, finished_iterations, iteration_name, resume_point

_MARK = "MEGATRON_DMS_VERIFY_RESUME"  # a variable in the environment of every process that is started here
_RESUMED = re.compile(r"resuming from iteration (\d+) ")  # what verified_saves.py prints
_SAVING = f"{UNFINISHED}*/iter_*"
_POLL = 0.002  # seconds
_STARTING = 1.0  # seconds between looks for the ranks: by the next look all of them are there
_ENDING = 8.0  # seconds for helpers to end: torch's data loader workers look for their parent every 5


class CheckFailed(Exception):
    """The promise was broken, or the command fails without being killed. The message is one line."""


@dataclass
class Plan:
    """What is run and how it is killed."""

    command: Sequence[str]
    """The command of a run, to which --save, --load, --train-iters and --save-interval are added."""
    out: Path
    """A new folder for both runs and their logs."""
    steps: int
    """Training steps of each run."""
    save_interval: int
    """Training steps between two saves."""
    kills: int
    while_saving: float
    """The share of the kills that wait for a save."""
    seed: int
    """Seed of the moments of the kills and of the ranks that are killed."""
    timeout: float
    """Seconds for one start of the run."""


@dataclass
class Found:
    """What happened."""

    kills: int = 0
    landed: int = 0
    """Kills that left an unfinished save."""
    resumed: list[int] = field(default_factory=list)
    """The iterations that runs resumed from."""
    lost: int = 0
    """Finished checkpoints that are gone."""
    leftovers: int = 0
    """Processes that outlived their run by more than a moment."""
    seconds: float = 0.0
    """Seconds that the whole check took."""


class _Life:
    """One start of the run, whose processes can be told from all others."""

    def __init__(self, plan: Plan, save: Path, log: Path) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.save, self.log, self.plan = save, log, plan
        flags = ["--train-iters", plan.steps, "--save-interval", plan.save_interval]
        flags += ["--save", save, "--load", save, "--tensorboard-dir", save.with_name(f"{save.name}.boards")]
        # The last of two equal flags counts, so the command's own folders are never touched.
        command = [*plan.command, *(str(flag) for flag in flags)]
        settings = os.environ | {_MARK: self.mark, "WANDB_MODE": "disabled"}
        self._left = set(save.glob(_SAVING))  # unfinished saves of earlier starts
        self.begin = time.monotonic()
        with log.open("w") as out:
            self.launcher = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=settings
            )

    def ranks(self) -> list[int]:
        """Wait for the ranks, then return their process ids: ranks have a RANK, their launcher has none."""
        found: list[int] = []
        while not found and self.launcher.poll() is None:
            time.sleep(_STARTING)
            found = sorted(pid for pid, parent in self._processes(b"RANK=") if not _holds(parent, b"RANK="))
        if not found:
            raise CheckFailed(f"the command ended before it had started a rank; {self.log}")
        return found

    def _processes(self, variable: bytes) -> list[tuple[int, int]]:
        """The process ids, each with its parent's, of the processes started here that have this variable."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdecimal() and _holds(int(name), f"{_MARK}={self.mark}".encode(), variable):
                try:
                    status = Path("/proc", name, "stat").read_text().rpartition(") ")[2].split()
                except OSError:
                    continue
                if status[0] != "Z":
                    found.append((int(name), int(status[1])))
        return found

    def wait(self) -> int:
        """Wait for the launcher's end -> its exit status."""
        left = self.begin + self.plan.timeout - time.monotonic()
        try:
            return self.launcher.wait(timeout=max(left, 1))
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"a run did not end within {self.plan.timeout:g} seconds; {self.log}") from None

    def end(self) -> int:
        """Kill the processes that are left -> their number, launcher and ranks not counted."""
        end = time.monotonic() + _ENDING
        while (left := self._processes(b"")) and time.monotonic() < end:
            time.sleep(0.05)
        for pid, _ in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.launcher.wait()
        return len(left)

    def is_saving(self) -> bool:
        """Whether this start has a checkpoint that is not in its place yet, or left one when it ended."""
        return any(path not in self._left for path in self.save.glob(_SAVING))


def _holds(pid: int, *variables: bytes) -> bool:
    """Whether a process was started with environment variables that begin with each of these."""
    try:
        words = b"\0" + Path("/proc", str(pid), "environ").read_bytes()
    except OSError:
        return False
    return all(b"\0" + variable in words for variable in variables)


class ResumeCheck:
    """Run, kill and compare as `plan` says."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.found = Found()
        self._random = random.Random(plan.seed)
        self._life: _Life | None = None
        self._until_saving = self._saving = self._between = 0.0  # seconds, measured in the uninterrupted run

    def run(self) -> tuple[int, list[str]]:
        """Do the whole check -> (number of tensors compared, names of the tensors that differ).

        Raises:
            CheckFailed: the promise was broken, or the command fails without being killed.
        """
        begin = time.monotonic()
        self.plan.out.mkdir(parents=True)
        whole, killed = self.plan.out / "whole", self.plan.out / "killed"
        try:
            self._uninterrupted(whole)
            while self.found.kills < self.plan.kills:
                if self._killed(killed):
                    say(f"the run ended after {self.found.kills} of {self.plan.kills} kills: add steps")
                    break
            else:
                self._to_the_end(killed)
        finally:
            if self._life is not None:
                self._life.end()
            self.found.seconds = time.monotonic() - begin
        return compare(*(run / iteration_name(self.plan.steps) for run in (whole, killed)))

    def _uninterrupted(self, save: Path) -> None:
        life = self._start(save)
        first, polls, saving = 0.0, 0, 0
        while life.launcher.poll() is None:
            if life.is_saving():
                first = first or time.monotonic() - life.begin
                saving += 1
            polls += bool(first)
            time.sleep(_POLL)
            if time.monotonic() - life.begin > self.plan.timeout:
                break
        self._ended_well(life)
        seconds = time.monotonic() - life.begin
        saves = max(1, self.plan.steps // self.plan.save_interval)
        self._until_saving = first
        self._saving = saving / max(1, polls) * (seconds - first) / saves
        self._between = (seconds - first) / saves
        say(f"uninterrupted: {self.plan.steps} steps in {seconds:.0f} s, {first:.0f} s until the first save")

    def _start(self, save: Path) -> _Life:
        log = self.plan.out / f"{save.name}-{self.found.kills:03d}.log"
        self._life = _Life(self.plan, save, log)
        return self._life

    def _ended_well(self, life: _Life) -> None:
        status = life.wait()
        if status:
            raise CheckFailed(f"the run failed by itself with status {status}; {life.log}")
        life.end()

    def _to_the_end(self, save: Path) -> None:
        expected, before = _pointer(save), set(finished_iterations(save))
        life = self._start(save)
        self._ended_well(life)
        self._resumed_from(expected, life)
        self._nothing_lost(save, expected, before)

    def _killed(self, save: Path) -> bool:
        """Start the run once and kill it once; True if the run was through before the kill."""
        expected, before = _pointer(save), set(finished_iterations(save))
        life = self._start(save)
        victim = self._random.choice(life.ranks())
        self._wait_for_the_moment(life)
        if life.launcher.poll() is not None:
            self._ended_well(life)
            return True
        os.kill(victim, signal.SIGKILL)
        life.wait()
        self.found.leftovers += life.end()
        self.found.kills += 1
        self.found.landed += life.is_saving()
        self._resumed_from(expected, life)
        self._nothing_lost(save, expected, before)
        where = "while saving, " if life.is_saving() else ""
        say(
            f"kill {self.found.kills} of {self.plan.kills}: {where}{time.monotonic() - life.begin:.0f} s "
            f"after the start from {expected}; newest checkpoint: {_pointer(save)}"
        )
        return False

    def _wait_for_the_moment(self, life: _Life) -> None:
        end = life.begin + self.plan.timeout
        if self._random.random() < self.plan.while_saving:
            saves = self._random.choice((1, 2)) if _pointer(life.save) else 2  # so that something is resumed
            for number in range(saves):
                while not life.is_saving() and life.launcher.poll() is None and time.monotonic() < end:
                    time.sleep(_POLL)
                while number + 1 < saves and life.is_saving() and life.launcher.poll() is None:
                    time.sleep(_POLL)
            time.sleep(self._random.uniform(0, 0.9 * self._saving))
            return
        wait = self._random.uniform(0, self._until_saving + 3 * self._between)
        while time.monotonic() - life.begin < wait:
            if life.launcher.poll() is not None or time.monotonic() > end:
                return
            time.sleep(0.02)

    def _resumed_from(self, expected: int | None, life: _Life) -> None:
        """Check that the run loaded the newest checkpoint, if it came to loading."""
        said = _RESUMED.search(life.log.read_text(errors="replace"))
        if said is None:
            return
        self.found.resumed.append(int(said[1]))
        if int(said[1]) != expected:
            raise CheckFailed(f"resumed from iteration {said[1]}, the newest was {expected}; {life.log}")

    def _nothing_lost(self, save: Path, pointer: int | None, before: set[int]) -> None:
        after = set(finished_iterations(save))
        gone = before - after
        if "--dms-keep-checkpoints" in " ".join(self.plan.command):  # the oldest may go
            gone = {iteration for iteration in gone if iteration >= min(after, default=0)}
        self.found.lost += len(gone)
        try:
            newest, passed = resume_point(save)
        except CheckpointError as error:
            raise CheckFailed(f"after kill {self.found.kills}: {error}") from error
        if gone or passed or not isinstance(newest, int | None) or (pointer or 0) > (newest or 0):
            raise CheckFailed(
                f"after kill {self.found.kills}: lost {sorted(gone)}, damaged {passed}, newest {newest}, "
                f"before it {pointer}; {save}"
            )


def _pointer(save: Path) -> int | None:
    path = save / TRACKER
    return int(path.read_text()) if path.is_file() else None


def compare(one: Path, other: Path) -> tuple[int, list[str]]:
    """Compare two checkpoints -> (number of tensors, names of the tensors whose bits are not the same)."""
    readers = Reader(one), Reader(other)
    names = sorted(readers[0].tensors.keys() | readers[1].tensors.keys())
    return len(names), [name for name in names if not _same(name, *readers)]


def _same(name: str, one: Reader, other: Reader) -> bool:
    if name not in one.tensors or name not in other.tensors:
        return False
    a, b = one.tensor(name), other.tensor(name)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    bits = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))  # NaN equals NaN, and 0 is not -0
    return torch.equal(*bits)
