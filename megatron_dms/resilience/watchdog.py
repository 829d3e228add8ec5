"""A watchdog thread in every rank: it ends a run that hangs, and names the rank to blame.

The main thread only notes where it is (phase, step, microbatch). The watchdog's thread publishes that note
every few seconds through a store client of its own, which works even if the main thread is stuck in a
collective. Under torchrun the agent of node 0 hosts the store, so the store outlives every rank.

Three things raise an alarm: a rank that made no progress for longer than the limit of its phase, a neighbour
(rank + 1) whose heartbeat stopped, and a run that is about to end (an exception, or torchrun's SIGTERM after
another rank died). Then every rank answers, and the rank that raised the alarm says which rank is slow, hangs
or is lost (hang_diagnosis.py). After an alarm of the first two kinds all ranks dump their stacks and end with
the status EXIT.

The watchdog cannot see which of several ranks hangs inside the same GPU kernel or collective.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from megatron_dms.config import DMSConfig
from megatron_dms.resilience.hang_diagnosis import Report, diagnose, name_lost, waits_for_others

EXIT = 6
"""Exit status of every rank after the watchdog has ended the run."""
START, STEP, VALIDATION, SAVE = "start", "training step", "validation", "save"
INTERVAL = 3.0  # seconds between heartbeats; each costs the store a handful of operations
_ENDED = "ended"
_ALARM, _DIAGNOSIS = "alarm", "diagnosis"  # keys of the store
_DISK = 3.0  # seconds that writing the stacks to disk may take: the disk may be what hangs
# Seconds for a SIGTERM to arrive: torchrun's goes to data loader workers too, whose end is an exception here.
_SIGTERM = 0.3
_TORCHRUN = 40.0  # seconds for torchrun to end the other ranks: it does so at once, or kills them after 30


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
    """One rank's watchdog. It runs while the `with` block runs, and names an exception that leaves the block.

    Args:
        limits: seconds without progress, by phase; 0: no limit.
        silence: seconds after which a rank without heartbeat, or a store without answer, is lost; 0: never.
        folder: where the stacks are written to, in addition to stderr; None: nowhere.
        interval: seconds between heartbeats.
    """

    def __init__(
        self, limits: dict[str, float], silence: float, folder: Path | None, interval: float = INTERVAL
    ) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self._limits, self._silence, self._folder, self._interval = limits, silence, folder, interval
        self._patience = 2 * interval + 2  # seconds for all ranks to see an alarm and answer
        # (phase, step, microbatches, when): one attribute, replaced whole, so that no lock is needed
        self._state = (START, 0, 0, time.monotonic())
        self._main = threading.main_thread().ident or 0
        self._store: dist.Store | None = None
        self._looked = time.monotonic()  # when the store last answered
        self._beat = 0
        self._neighbour: tuple[str, float] = ("", time.monotonic())  # its last heartbeat, and since when
        self._pipe = os.pipe()
        self._stopping, self._failing, self._signalled = False, False, False  # what woke the thread
        self._after = ""  # which rank's alarm came before an exception here: the alarm may have caused it
        self._asked = threading.Event()  # set when the others were asked about a failure here
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @classmethod
    def of_run(cls, dms: DMSConfig, args: Namespace) -> "Watchdog":
        """Make the watchdog of a training run, with the limits that the flags set."""
        limits = {START: dms.start_limit, STEP: dms.step_limit, VALIDATION: dms.step_limit}
        folder = Path(args.save) / "watchdog" if args.save else None
        return cls(limits | {SAVE: dms.save_limit}, dms.heartbeat_limit, folder)

    # What the main thread calls.

    def beat(self, phase: str, step: int) -> None:
        """Note that a microbatch of a training step (from 1) or of a validation begins."""
        before = self._state
        count = before[2] + 1 if before[:2] == (phase, step) else 1
        self._state = (phase, step, count, time.monotonic())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase within another phase, which goes on afterwards."""
        phase, step, count, _ = self._state
        self._state = (name, step, 0, time.monotonic())
        yield  # not where an exception leaves: the phase is part of its message
        self._state = (phase, step, count, time.monotonic())

    def __enter__(self) -> "Watchdog":
        faulthandler.enable()  # a crash in C code, such as a bus error, prints its stack
        os.set_blocking(self._pipe[1], False)
        # Python runs signal handlers in the main thread, which may be stuck. Python writes to this file
        # descriptor at once.
        self._handled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._handled:  # otherwise Megatron's --exit-signal-handler handles SIGTERM
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, _left_to_the_thread)
            os.register_at_fork(after_in_child=_forget_signals)
        self._thread.start()
        if self._silence and self.world > 1:
            threading.Thread(target=self._guard, name="watchdog guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        said = isinstance(error, SystemExit) and error.code  # whoever raised it has named the cause
        if said or isinstance(error, Exception):
            report = self._report()
            time.sleep(_SIGTERM)
            if self._signalled:
                self._thread.join(2 * self._patience)  # it ends this process
            if not said and error is not None:
                self._say(f"error: {report.name}, {report.place}: {_in_one_line(error)}{self._after}")
            if self.world > 1 and self._thread.is_alive():
                self._failing = True
                os.write(self._pipe[1], b"\0")
                self._asked.wait(self._interval + 2 * self._patience)
        self._stopping = True
        os.write(self._pipe[1], b"\0")
        self._thread.join(self._interval)
        if self._handled:
            signal.set_wakeup_fd(self._wakeup_before)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # The thread.

    def _watch(self) -> None:
        try:
            self._run()
        except Exception as error:  # a watchdog that fails does not end the run, and says so
            self._say(f"watchdog: rank {self.rank} goes on without one: {_in_one_line(error)}")
        finally:
            self._asked.set()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._pipe[0]], [], [], self._interval)
            signals = os.read(self._pipe[0], 4096) if ready else b""
            if self._stopping:
                with contextlib.suppress(RuntimeError):
                    if self._store is not None:
                        self._store.set(f"beat/{self.rank}", _ENDED)
                return
            if signal.SIGTERM in signals and not self._failing:
                self._signalled = True
                self._alarm("ended by SIGTERM", stacks=False)
                os._exit(128 + signal.SIGTERM)
            if self._failing:
                self._alarm("ended by an exception", stacks=False)
                self._asked.set()
                self._failing = False
                continue
            self._look()

    def _look(self) -> None:
        """Send one heartbeat, then look at the other ranks and at the clock."""
        report = self._report()
        cause = ""
        try:
            if self.world > 1:
                self._connect()
                cause = self._exchange(report)
            self._looked = time.monotonic()
        except RuntimeError:  # the store failed; the guard minds for how long
            self._store = None
        limit = self._limits[report.phase]
        if limit and report.seconds > limit:
            late = f"{report.seconds:.0f} s in {report.place}, limit {limit:g} s"
            cause = f"{report.name} made no progress for {late}"
        if cause:
            self._alarm(cause, stacks=True)
            self._exit()

    def _connect(self) -> None:
        if self._store is None:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(self._interval, 5)),
            )
            self._store = dist.PrefixStore(f"megatron_dms/watchdog/{attempt}", store)

    def _exchange(self, report: Report) -> str:
        """Publish the heartbeat and answer another rank's alarm -> the cause of an alarm of ours, or ""."""
        assert self._store is not None
        self._store.set(f"beat/{self.rank}", report.to_json())
        if self._store.check([_ALARM]):
            self._answer(json.loads(self._store.get(_ALARM)))
        other = (self.rank + 1) % self.world
        key, now = f"beat/{other}", time.monotonic()
        found = self._value(key)
        if found != self._neighbour[0]:
            self._neighbour = (found, now)
        silent = now - self._neighbour[1]
        # Before its first heartbeat a rank imports and reads headers, which a slow disk draws out.
        limit = self._silence if found else self._limits[START]
        if found != _ENDED and limit and silent > limit:
            return f"rank {other} sent no heartbeat for {silent:.0f} s, limit {limit:g} s"
        return ""

    def _alarm(self, cause: str, stacks: bool) -> None:
        """Ask all ranks and say which one is to blame, or join the alarm of a rank that was first."""
        alarm = {"rank": self.rank, "cause": cause, "stacks": stacks}
        try:
            if self.world == 1:
                if stacks:
                    self._dump_stacks()
                    self._say(f"watchdog: {cause}: {diagnose([self._report()], {})}")
                return None
            self._connect()
            assert self._store is not None
            first = json.loads(self._store.compare_set(_ALARM, "", json.dumps(alarm)))
            if first != alarm:
                return self._answer(first)
            if stacks:
                self._dump_stacks()
            self._store.set(f"answer/{self.rank}", self._report().to_json())
            text = self._diagnosis(stacks)
            if text:
                self._say(f"watchdog: {cause}: {text}")
            self._store.set(_DIAGNOSIS, text)
        except RuntimeError:
            if stacks:
                self._dump_stacks()
            self._say(f"watchdog: {cause}; {self._store_name()} does not answer, so no other rank was asked")

    def _diagnosis(self, stacks: bool) -> str:
        """Wait for the answers; -> a line that names the rank to blame, or ""."""
        assert self._store is not None
        beats = {rank: self._value(f"beat/{rank}") for rank in range(self.world)}
        keys = {rank: f"answer/{rank}" for rank, beat in beats.items() if beat != _ENDED}
        self._wait_for(list(keys.values()))
        found = {rank: self._value(key) for rank, key in keys.items()}
        answers = {rank: Report.from_json(value) for rank, value in found.items() if value}
        silent = {
            rank: Report.from_json(beats[rank]) if beats[rank] else None
            for rank in keys
            if rank not in answers
        }
        if stacks:
            return diagnose(list(answers.values()), silent)
        own = self._report()
        return f"{name_lost(silent)}; {own.name} was in {own.place}" if silent else ""

    def _wait_for(self, keys: list[str]) -> None:
        """Wait until the store has the keys, or patience ends."""
        assert self._store is not None
        end = time.monotonic() + self._patience
        while not self._store.check(keys) and time.monotonic() < end:
            self._looked = time.monotonic()
            time.sleep(0.05)

    def _value(self, key: str) -> str:
        assert self._store is not None
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _answer(self, alarm: dict[str, Any]) -> None:
        """Answer another rank's alarm: tell it where this rank is, and end with it."""
        assert self._store is not None
        if not self._failing:
            self._after = f" (after an alarm of rank {alarm['rank']})"
        if alarm["stacks"]:
            self._dump_stacks()
        self._store.set(f"answer/{self.rank}", self._report().to_json())
        self._wait_for([_DIAGNOSIS])
        if alarm["stacks"]:
            self._exit()
        # torchrun names the rank that ended first as the cause, so the rank with the cause must end first.
        self._looked += _TORCHRUN
        if not (self._failing or self._signalled or select.select([self._pipe[0]], [], [], _TORCHRUN)[0]):
            self._exit()

    def _guard(self) -> None:
        """End the run if the store itself hangs or is gone. Runs in a thread of its own."""
        while not self._stopping and self._thread.is_alive():
            time.sleep(self._interval)
            silent = time.monotonic() - self._looked
            if silent > self._silence and not self._stopping:
                self._dump_stacks()
                report = self._report()
                self._say(
                    f"watchdog: {report.name}, {report.place}: {self._store_name()} has not answered for "
                    f"{silent:.0f} s, limit {self._silence:g} s: node 0 is lost"
                )
                self._exit()

    def _store_name(self) -> str:
        return f"the store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def _report(self) -> Report:
        phase, step, count, since = self._state
        frame = sys._current_frames().get(self._main)
        where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "?"
        self._beat += 1
        return Report(
            *(self.rank, socket.gethostname(), os.getpid(), phase, step, count),
            seconds=time.monotonic() - since,
            waits=frame is not None and waits_for_others(frame),
            where=where,
            beat=self._beat,
        )

    def _dump_stacks(self) -> None:
        """Write all threads' stacks to stderr, in one write, and to a file if the disk takes it."""
        report = self._report()
        memory = os.memfd_create("stacks")
        os.write(memory, f"watchdog: stacks of {report.name}, {report.place}\n".encode())
        faulthandler.dump_traceback(memory)
        text = os.pread(memory, os.fstat(memory).st_size, 0)
        os.close(memory)
        os.write(2, text)
        if self._folder is not None:
            path = self._folder / f"rank-{self.rank:05d}-stacks.txt"
            writer = threading.Thread(target=_write, args=(path, text), daemon=True)
            writer.start()
            writer.join(_DISK)

    def _say(self, text: str) -> None:
        os.write(2, f"pretrain_dms.py: {text}\n".encode())

    def _exit(self) -> None:
        os._exit(EXIT)


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing at SIGTERM: the watchdog's thread was told through the wakeup file descriptor."""


def _forget_signals() -> None:
    """Let SIGTERM end a forked child, such as a data loader's worker, whose signals are its own."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _write(path: Path, text: bytes) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def _in_one_line(error: BaseException) -> str:
    """The error in one line. A data loader's worker hands on a traceback: its last line is the error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    said = lines[-1].strip() if lines else ""
    return said if said.split(":")[0].endswith(type(error).__name__) else f"{type(error).__name__}: {said}"
