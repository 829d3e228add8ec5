"""JSON files, read as an object or refused in one line."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path, otherwise: str) -> dict[str, Any]:
    """
    Args:
        otherwise: what its folder is if the file cannot be read, such as "is not a checkpoint".

    Raises:
        ValueError: it cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path.parent} {otherwise}: its {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object")
    return found
