"""A Megatron checkpoint folder: the iteration to open, its arguments, and the HF side files beside it.

<dir>/latest_checkpointed_iteration.txt    "release" after an import, else a number; written last
<dir>/release/  or  <dir>/iter_0000500/    torch_dist format
<dir>/hf/                                  config.json, tokenizer ... and `SOURCE`, which lists the HF tensors
"""

from argparse import Namespace
from pathlib import Path

from megatron_dms.errors import CheckpointError
from megatron_dms.formats.torch_dist import Reader

_MOST_DIGITS = 20
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF = "hf"
SOURCE = "megatron_dms_source.json"
"""File in hf/ with the names, types and files of the imported tensors, so that export gives them back as
they were.
"""
BUFFERS = "megatron_dms_buffers.safetensors"
"""File in hf/ with tensors that came with the import but are no part of the model."""


def iteration_folder(megatron_dir: Path, iteration: int | None = None) -> Path:
    """Return the folder of one iteration; None means the latest. Raises CheckpointError if it is missing."""
    if not megatron_dir.is_dir():
        raise CheckpointError(f"{megatron_dir} is no folder; expected a Megatron checkpoint")
    if iteration is not None:
        folder = megatron_dir / f"iter_{iteration:07d}"
    else:
        tracker = megatron_dir / TRACKER
        if not tracker.is_file():
            raise CheckpointError(
                f"{tracker} is missing: no checkpoint was finished here; name one with --iteration"
            )
        text = tracker.read_text(errors="replace").strip()
        if text != RELEASE and not (text.isdecimal() and len(text) < _MOST_DIGITS):
            raise CheckpointError(f"{tracker} says {text[:80]!r}, expected a number or {RELEASE!r}")
        folder = megatron_dir / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not folder.is_dir():
        found = sorted(path.name for path in megatron_dir.iterdir() if path.is_dir() and path.name != HF)
        raise CheckpointError(
            f"{folder} is missing; found {', '.join(found) or 'no checkpoint'} in {megatron_dir}"
        )
    return folder


def open_checkpoint(megatron_dir: Path, iteration: int | None = None) -> tuple[Reader, Namespace]:
    """Return reader and arguments of one iteration, after a check of every file's presence and size."""
    reader = Reader(iteration_folder(megatron_dir, iteration))
    args = reader.common().get("args")
    if not isinstance(args, Namespace):
        raise CheckpointError(f"{reader.folder} holds no training arguments (found {type(args).__name__})")
    return reader, args


def checkpoint_args(megatron_dir: str | Path, iteration: int | None = None) -> Namespace:
    """Return the arguments stored in a Megatron checkpoint, for checks before training.

    Looks at files only; no process group is needed. Raises CheckpointError, naming the file, for a missing
    tracker, a half-written folder, or a file that is missing or shorter than the metadata say.
    """
    return open_checkpoint(Path(megatron_dir), iteration)[1]
