"""Which rank holds the others up: what each tells of itself, and the rule by which one is named.

In a synchronous run one hanging rank makes all of them late: the others sit in a collective and wait for it.
So lateness names nobody. What does: not answering at all, not waiting while all others wait, or being behind.
"""

import dis
import json
from dataclasses import asdict, dataclass
from types import FrameType

# Where Python's innermost frame stands while a rank waits for others (torch 2.13, megatron-core 0.19.2), and
# what it calls while it waits for a Work or for the device, which in turn may wait for others.
_WAITING_FILES = ("torch/distributed/distributed_c10d.py", "pipeline_parallel/p2p_communication.py")
_WAITING_CALLS = frozenset({"wait", "item", "tolist", "cpu", "synchronize"})
_INNERMOST = 4  # frames: distributed_c10d's decorators and helpers stand between


@dataclass(frozen=True)
class Report:
    """What a rank tells of itself."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    """Training step under way, from 1; 0 before the first."""
    microbatches: int
    """Begun in this step or phase."""
    seconds: float
    """Since the last microbatch or phase began."""
    waits: bool
    """Whether the main thread waits for other ranks or for the device."""
    where: str
    """The main thread's innermost line."""
    beat: int = 0
    """Number of this report: one that does not grow comes from a rank that is silent."""

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
    """Whether a thread whose innermost frame this is waits for other ranks or for the device.

    Looks at code objects only: reading source files would hang where the disk does.
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


def verdict(answers: list[Report], silent: dict[int, Report | None]) -> str:
    """Who is to blame, in one line.

    Args:
        answers: what the ranks said that answered when asked.
        silent: the last heartbeat, if there was one, of each rank that did not answer.
    """
    if silent:
        return lost(silent)
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


def lost(silent: dict[int, Report | None]) -> str:
    """Names ranks that do not answer: their process or machine is dead or frozen."""
    return "; ".join(
        f"{last.name} is lost: it does not answer, its last heartbeat came from {last.place}"
        if last
        else f"rank {rank} is lost: it does not answer and never sent a heartbeat"
        for rank, last in silent.items()
    )
