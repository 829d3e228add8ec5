"""The rules of layouts, against laying the parts out by hand."""

from itertools import product

import pytest

from megatron_dms.layout_rules import (
    batch_multiple,
    data_parallel_size,
    fills_virtual_stages,
    first_inexact,
    heads_can_be_shared,
    model_divisions,
    sequence_parallel_multiple,
    sequence_parts,
)


def test_the_first_rule_that_is_broken_is_named() -> None:
    """Catches: layers divided by TP, heads by PP, a model that fits and is refused."""
    assert first_inexact(model_divisions(8, 4, 96, 6, tp=4, pp=3)) is None
    cases = {
        (9, 4, 96, 6): ("query heads", 9, 4),
        (8, 2, 96, 6): ("KV heads", 2, 4),
        (8, 4, 98, 6): ("MLP channels", 98, 4),
        (8, 4, 96, 7): ("layers", 7, 3),
    }
    for sizes, expected in cases.items():
        assert first_inexact(model_divisions(*sizes, tp=4, pp=3)) == expected


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (12, 4), (6, 6)])
def test_heads_are_shared_out_in_groups(heads: int, groups: int) -> None:
    """Query heads go to CP ranks in blocks. Each KV head is on one rank, or each rank reads one KV head.

    Catches: a CP that would give a rank parts of two KV heads.
    """
    for cp in range(1, heads + 1):
        blocks = [range(rank * heads // cp, (rank + 1) * heads // cp) for rank in range(cp)]
        read = [{head // (heads // groups) for head in block} for block in blocks]
        once = sum(map(len, read)) == groups or all(len(kv) == 1 for kv in read)
        assert heads_can_be_shared(heads, groups, cp) == (heads % cp == 0 and once), cp


def test_sizes() -> None:
    """Catches: the two parts of a rank forgotten, a world that does not divide rounded down."""
    assert [sequence_parts(cp) for cp in (1, 2, 4)] == [1, 4, 8]
    assert sequence_parallel_multiple(2, 4) == 8 and batch_multiple(3, 4) == 12
    assert data_parallel_size(16, 2, 2, 2) == 2 and data_parallel_size(12, 2, 2, 2) is None
    assert data_parallel_size(4, 0, 1, 1) is None


def test_virtual_stages_are_filled() -> None:
    """Groups are cut off; the rest is empty or at least PP. Catches: fewer than one group taken."""
    for microbatches, group, pp in product(range(1, 30), range(2, 8), (2, 3)):
        if group < pp:
            continue
        rest = microbatches
        while rest >= group:
            rest -= group
        expected = microbatches >= group and (rest == 0 or rest >= pp)
        assert fills_virtual_stages(microbatches, group, pp) == expected
