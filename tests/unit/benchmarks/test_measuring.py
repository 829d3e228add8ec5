"""How candidates are measured: bytes against counting by hand, the turns they take, and failures."""

import pytest
import torch
from torch import Tensor

from megatron_dms.benchmarks.measuring import Candidate, Measured, Memory, compare, device_name, ratio

CPU = torch.device("cpu")
KB = 250
"""Numbers in fp32."""


def test_bytes_are_those_counted_by_hand() -> None:
    """Catches: views or results in place counted as new, storages that never die, a peak that forgets, inputs
    counted, the graph's tensors overlooked."""
    x = torch.ones(4 * KB, requires_grad=True)
    with Memory(CPU) as memory:
        y = x * 2  # 4 KB
        z = y.view(2, -1)[:, 1:].relu_()  # the same storage
        assert (memory.alive, memory.peak) == (4000, 4000)
        torch.empty(7 * KB)  # 7 KB, dead at once
        assert (memory.alive, memory.peak) == (4000, 11000)
        x.detach().add_(1)
        del y, z
        assert memory.alive == 0
        total = x.square().exp().sum()  # 4 KB each for square and exp; exp's backward keeps its result
        assert memory.alive == 4000 + 4
        del total
        torch.empty(3 * KB, dtype=torch.bfloat16)  # half of that
        assert (memory.alive, memory.peak) == (0, 11000)
    kept = torch.ones(KB)  # after the end
    assert (memory.alive, memory.peak) == (0, 11000), kept


def test_candidates_take_turns() -> None:
    """Catches: one candidate's repetitions in a row, `prepare` left out or timed, an order that changes."""
    calls = []
    found = compare(
        {
            "a": Candidate(lambda: calls.append("a"), lambda: calls.append("prepare")),
            "b": Candidate(lambda: calls.append("b")),
        },
        3,
        CPU,
    )
    assert calls == ["prepare", "a"] * 2 + ["b"] * 2 + ["prepare", "a", "b"] * 3
    for own in found.values():
        assert own.low_ms <= own.ms <= own.high_ms and own.peak_bytes == 0 and own.note is None


def test_what_fails_is_not_measured_and_the_others_are() -> None:
    """Catches: a run that ends with its first failure, a time of the rounds before it, a reason lost."""
    rounds = iter(range(9))

    def short_of_memory() -> Tensor:
        if next(rounds) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return torch.zeros(1)

    def refused() -> None:
        raise ValueError("head size 7\nand more")

    found = compare(
        {"late": Candidate(short_of_memory), "at once": Candidate(refused), "fine": Candidate(lambda: None)},
        4,
        CPU,
    )
    assert found["late"] == Measured(note="out of memory")
    assert found["at once"] == Measured(note="ValueError: head size 7")
    assert found["fine"].ms is not None
    assert ratio(found["fine"], found["late"]) is None and ratio(found["late"], found["fine"]) is None


def test_quartiles_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with numbers worked out by hand. Catches: a mean, seconds for milliseconds, a ratio upside
    down, times of several calls."""
    seconds = iter([9, 9, 9, 1, 2, 3, 4])  # the first three warm up
    monkeypatch.setattr("megatron_dms.benchmarks.measuring._seconds", lambda candidate, device: next(seconds))
    monkeypatch.setattr(
        "megatron_dms.benchmarks.measuring._peak", lambda candidate, device: None if next(seconds) else 0
    )
    own = compare({"a": Candidate(int)}, 4, CPU)["a"]
    assert (own.low_ms, own.ms, own.high_ms, own.peak_bytes) == (1750, 2500, 3250, None)
    assert ratio(own, Measured(ms=5000)) == 0.5
    assert own.per(5) == Measured(500, 350, 650)


def test_device_name() -> None:
    """Catches: a name without the number of threads, on which times depend."""
    assert device_name(CPU).endswith(f", {torch.get_num_threads()} threads")
