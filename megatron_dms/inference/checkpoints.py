"""What the folder of a checkpoint says, without loading it: its config.json, its dtype, and a hash of it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_dms.files import read_object

DTYPES = ("auto", "float32", "bfloat16", "float16")

# The files in a model's folder that determine its output, as patterns of names.
_PARTS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.py",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
)
_LARGE = 1 << 30  # bytes


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ValueError: the file is missing, or is not a JSON object.
    """
    return read_object(folder / "config.json", "is not a checkpoint")


def same_dtype(folders: Mapping[str, Path], dtype: str) -> str:
    """The dtype in which all models run: `dtype`, or for "auto" the dtype that every config.json names.

    Raises:
        ValueError: the files name different dtypes, or a file names no dtype of DTYPES.
    """
    if dtype != "auto":
        return dtype
    found: dict[Path, str] = {}
    for folder in folders.values():
        config = read_config(folder)
        named = config.get("dtype") or config.get("torch_dtype")
        found[folder] = str(named).removeprefix("torch.")
        if found[folder] not in DTYPES[1:]:
            raise ValueError(
                f"{folder}: config.json names {'no dtype' if named is None else f'the dtype {named}'}: say "
                f"which with --dtype {'|'.join(DTYPES[1:])}"
            )
    first = next(iter(found))
    for folder, name in found.items():
        if name != found[first]:
            raise ValueError(
                f"the config.json of {first} names {found[first]}, that of {folder} {name}: methods are "
                f"compared in one dtype; choose it with --dtype {found[first]} or --dtype {name}"
            )
    return found[first]


def fingerprint(folder: Path, say: Callable[[str], None] = lambda line: None) -> str:
    """A hash of config, generation settings, tokenizer, code and weights, which tells checkpoints apart.

    Args:
        say: called with a line of progress for each large file.

    Raises:
        ValueError: the folder has no config.json, or config.json cannot be read.
    """
    read_config(folder)
    found = hashlib.sha256()
    for path in sorted({path for pattern in _PARTS for path in folder.glob(pattern) if path.is_file()}):
        if (size := path.stat().st_size) >= _LARGE:
            say(f"hashing {path}, {size / 1e9:.1f} GB")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.update(json.dumps([path.name, digest]).encode())
    return found.hexdigest()[:16]
