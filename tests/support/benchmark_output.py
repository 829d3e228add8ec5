"""Reading what `bench` prints."""

import json

import pytest


def rows_of(out: str, columns: int) -> list[dict]:
    """Parse the JSON lines, and check that the table has as many rows; NaN and Infinity are no JSON."""
    lines = out.splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines if line.startswith("{")]
    assert len(lines) == 2 + 2 * len(rows)
    assert len(lines[2].split("  ")) >= columns
    return rows
