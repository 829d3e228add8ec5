"""Text tables: columns, alignment, rules."""

import pytest

from megatron_dms.text_table import RULE, text_table


def test_columns() -> None:
    """Catches: a column as wide as its heading only, the first column's alignment for all others, a rule of
    another width than the table, spaces at the ends of lines."""
    rows = [["name", "ms", "note"], RULE, ["a", "1.5", ""], RULE, ["longer", "10.25", "slow"]]
    assert text_table(rows, "<><").split("\n") == [
        "name       ms  note",
        "-------------------",
        "a         1.5",
        "-------------------",
        "longer  10.25  slow",
    ]
    assert text_table([["a", "b", "c"], ["10", "20", "30"]], "<>") == "a    b   c\n10  20  30"
    assert text_table([["a"], ["10"]]) == " a\n10"


@pytest.mark.parametrize(
    ("rows", "align"), [([], ">"), ([RULE], ">"), ([["a", "b"], ["c"]], ">"), ([["a"]], ""), ([["a"]], "^")]
)
def test_refused(rows: list[list[str]], align: str) -> None:
    """Catches: a cell that is dropped because its row is longer than the heading."""
    with pytest.raises(ValueError):
        text_table(rows, align)
