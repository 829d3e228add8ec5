"""Tables as plain text for the command lines; every column is as wide as its widest cell."""

from collections.abc import Sequence

RULE: Sequence[str] = ()
"""A row that `text_table` draws as a line of dashes across the whole table."""
_GAP = "  "


def text_table(rows: Sequence[Sequence[str]], align: str = ">") -> str:
    """Return the rows as lines of text, without spaces at the ends of the lines.

    Args:
        rows: the heading first. Every row has one cell for each column, or is RULE.
        align: "<" (left) or ">" (right) for each column, from the first one on; the last sign also holds for
            all further columns. "<>" puts the first column to the left and all others to the right.

    Raises:
        ValueError: there is no row with cells, the rows have different numbers of cells, or `align` has
            another sign.
    """
    widths = [max(map(len, column)) for column in zip(*filter(len, rows), strict=True)]
    if not widths or not align or not set(align) <= set("<>"):
        raise ValueError(f"found {len(rows)} rows and align {align!r}, expected cells, and signs < and >")
    signs = align + align[-1] * (len(widths) - len(align))
    forms = [f"{sign}{width}" for sign, width in zip(signs, widths, strict=False)]
    rule = "-" * (sum(widths) + len(_GAP) * (len(widths) - 1))
    return "\n".join(_GAP.join(map(format, row, forms)).rstrip() if len(row) else rule for row in rows)
