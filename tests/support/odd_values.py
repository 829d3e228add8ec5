"""Odd values, and how a conversion answers to them."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dms.conversion import CheckpointError, export_hf, import_hf
from megatron_dms.formats.megatron_folder import TRACKER
from tests.support.checkpoint_edits import files_of

VALUES = ([], {}, "x", "", -1, 0, 1, 1.5, True, False, None, math.nan, math.inf, [[]], 10**30, 10**400, "\n")
DEEP = "[" * 100_000
SECONDS = 2  # a value that makes a loop endless must not make the tests so


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("took longer than it may")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def outcome(call: Callable[[], object]) -> str:
    """Return "accepted", "refused" (by a CheckpointError of one line), or a description of any other end."""
    try:
        with time_limit():
            call()
    except CheckpointError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"several lines: {str(error)!r}"
    except BaseException as error:
        traceback, place = error.__traceback__, ""
        while traceback is not None:
            code = traceback.tb_frame.f_code
            if "megatron_dms" in code.co_filename:
                place = f"{Path(code.co_filename).name}:{traceback.tb_lineno} {code.co_name}"
            traceback = traceback.tb_next
        return f"{type(error).__name__} at {place}: {str(error)[:100]}"
    return "accepted"


def short(value: object) -> str:
    text = f"1e{len(str(value)) - 1}" if isinstance(value, int) and value > 1e9 else repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def convert(source: Path, work: Path) -> None:
    """Import and export; the export must equal the source."""
    import_hf(source, work / "out_megatron")
    export_hf(work / "out_megatron", work / "out_hf")
    assert files_of(work / "out_hf") == files_of(source), "it came back otherwise"


def leaves_nothing(convert_it: Callable[..., object], source: Path, work: Path) -> str:
    """Return the outcome of a conversion, and check that its output is there if and only if it was
    accepted."""
    work.mkdir(exist_ok=True)
    found = outcome(lambda: convert_it(source, work / "out"))
    left = [str(path.relative_to(work)) for path in work.rglob("*")]
    shutil.rmtree(work)
    if found == "accepted":
        return found if "out" in left else "accepted, but there is no output"
    return found if not left else f"{found}, and left {left[:3]}"


def must(found: dict[str, str], *allowed: str) -> None:
    """Fail with every case whose outcome is none of those allowed."""
    bad = [f"{case}: {text}" for case, text in found.items() if text not in allowed]
    assert not bad, "\n".join(["", *bad])


def damaged(work: Path, source: Path, name: str, content: bytes) -> str:
    """Return the outcome of converting a folder with one file replaced; put the file back afterwards."""
    convert_it = export_hf if (source / TRACKER).exists() else import_hf
    before = (source / name).read_bytes()
    (source / name).write_bytes(content)
    try:
        return leaves_nothing(convert_it, source, work)
    finally:
        (source / name).write_bytes(before)


def header(source: Path) -> tuple[dict, bytes]:
    content = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(text: str, rest: bytes) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + rest
