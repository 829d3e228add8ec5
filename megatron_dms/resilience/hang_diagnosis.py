"""Which rank holds the others up: what each rank reports of itself, and the rule by which one is named.

In a synchronous run one hanging rank makes all ranks late: the others sit in a collective and wait for it. So
lateness names nobody. A rank is to blame if it does not answer at all, if it does not wait while all others
wait, or if it is behind the others.
"""

import dis
import json
from dataclasses import asdict, dataclass
from types import FrameType

# The files in which Python's innermost frame stands while a rank waits for others, and the methods that it
# calls while it waits for a Work or for the device, which in turn may wait for others.
_WAITING_FILES = ("torch/distributed/distributed_c10d.py", "pipeline_parallel/p2p_communication.py")
_WAITING_CALLS = frozenset({"wait", "item", "tolist", "cpu", "synchronize"})
_INNERMOST = 4  # frames looked at: distributed_c10d's decorators and helpers stand between


@dataclass(frozen=True)
class Report:
    """What a rank reports of itself."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    """Training step under way, from 1; 0 before the first."""
    microbatches: int
    """Microbatches begun in this step or phase."""
    seconds: float
    """Seconds since the last microbatch or phase began."""
    waits: bool
    """Whether the main thread waits for other ranks or for the device."""
    where: str
    """The main thread's innermost line."""
    beat: int = 0
    """Number of this report: if it does not grow, the rank is silent."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}"


def waits_for_others(frame: FrameType) -> bool:
    """Whether a thread with this innermost frame waits for other ranks or for the device.

    Only code objects are looked at: reading source files would hang where the disk hangs.
    """
    names = {
        instruction.argval
        for instruction in dis.get_instructions(frame.f_code)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL")
        and instruction.positions is not None
        and instruction.positions.lineno == frame.f_lineno
    }
    if names & _WAITING_CALLS:
        return True
    inner: FrameType | None = frame
    for _ in range(_INNERMOST):
        if inner is None:
            return False
        if inner.f_code.co_filename.endswith(_WAITING_FILES):
            return True
        inner = inner.f_back
    return False


def diagnose(answers: list[Report], silent: dict[int, Report | None]) -> str:
    """Say in one line which rank is to blame.

    Args:
        answers: the reports of the ranks that answered when they were asked.
        silent: by rank that did not answer, its last heartbeat; None if it never sent one.
    """
    if silent:
        return name_lost(silent)
    suspects = [report for report in answers if not report.waits] or answers
    first = min((report.step, report.microbatches) for report in suspects)
    behind = [report for report in suspects if (report.step, report.microbatches) == first]
    if len(behind) == len(answers) > 1:
        return f"no rank stands out: all {len(answers)} are in {behind[0].place}; their stacks may tell"
    return "; ".join(
        f"{report.name} is slow or hangs: {report.place}, microbatch {report.microbatches}, "
        f"{report.seconds:.0f} s without progress, in {report.where}"
        for report in behind
    )


def name_lost(silent: dict[int, Report | None]) -> str:
    """Name the ranks that do not answer: their process or machine is dead or frozen."""
    return "; ".join(
        f"{last.name} is lost: it does not answer, its last heartbeat came from {last.place}"
        if last
        else f"rank {rank} is lost: it does not answer and never sent a heartbeat"
        for rank, last in silent.items()
    )
