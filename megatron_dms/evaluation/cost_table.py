"""The figures of cost.py as text."""

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = {  # heading: (name, width, format)
    "tokens": ("prompt_tokens", 8, "d"),
    "generated": ("generated_tokens", 11, "d"),
    "CR": ("achieved_cr", 8, ".2f"),
    "KV reads": ("kv_reads", 13, ".1f"),
    "dense": ("dense_kv_reads", 13, "d"),
    "peak pairs": ("peak_tokens", 12, ".1f"),
    "dense ": ("dense_peak_tokens", 10, "d"),
    "peak bytes": ("peak_bytes", 14, "d"),
    "dense  ": ("dense_bytes", 14, "d"),
}


def cost_table(rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> str:
    """A line for each prompt and one for all."""
    head = f"{'line':>6}" + "".join(f"{name.strip():>{width}}" for name, (_, width, _) in _COLUMNS.items())
    lines = [head, "-" * len(head)]
    lines += [_line(str(row["line"]), row) for row in rows]
    return "\n".join([*lines, lines[1], _line("all", totals)])


def _line(label: str, row: Mapping[str, Any]) -> str:
    return f"{label:>6}" + "".join(_cell(row[name], width, form) for name, width, form in _COLUMNS.values())


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"


def head_tables(tables: Mapping[str, Sequence[Sequence[float | None]]]) -> str:
    """A table of layers and KV heads for each figure."""
    headings = {
        "achieved_cr": ("achieved CR", ".2f"),
        "kv_reads": ("KV reads, all sequences", ".1f"),
        "peak_tokens": ("peak live pairs, mean of the sequences", ".1f"),
    }
    lines = []
    for name, (heading, form) in headings.items():
        table = tables[name]
        lines += [heading, "layer " + "".join(f"{f'head {head}':>12}" for head in range(len(table[0])))]
        lines += [
            f"{layer:>5} " + "".join(_cell(value, 12, form) for value in row)
            for layer, row in enumerate(table)
        ]
        lines.append("")
    return "\n".join(lines[:-1])
