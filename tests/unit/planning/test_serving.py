"""Planning: inference by hand, and the longest context against trying every length."""

from dataclasses import replace

import pytest

from megatron_dms.planning.devices import Assumptions, Device
from megatron_dms.planning.models import ModelSize
from megatron_dms.planning.serving import Serving, live_pairs, longest

MODEL = ModelSize("small", 4, 8, 16, 4, 2, 4, 100, 300)
DEVICE = Device("device", 1e30, 1e12, 100.0, 1000.0, 10.0, per_node=4)
ASSUMED = Assumptions(memory=0.5, matmul=0.5, network=0.5, latency=0.25, overhead=1000.0)
SERVING = Serving(MODEL, DEVICE, ASSUMED, window=9)
WEIGHTS = 4 * (8 * (32 + 16 + 48) + 16) + 2 * 800 + 8
PAIR = 4 * 2 * 4 * 2 * 2
"""Bytes: 4 layers, 2 heads of 4, keys and values, bf16."""


def test_live_pairs() -> None:
    """Every pair up to window + 1 lives, then one in CR. Catches: the window counted as compressed."""
    assert [live_pairs(tokens, 4, 9) for tokens in (1, 10, 14, 50)] == [1, 10, 11, 20]
    assert live_pairs(50, 1, 9) == 50


def test_bytes_by_hand() -> None:
    """Catches: half a page for a dense cache, a copy while growing of all tensors, weights of fp32."""
    assert SERVING.weight_bytes == 2 * WEIGHTS and SERVING.read_bytes == 2 * (WEIGHTS - 800)
    assert replace(SERVING, model=replace(MODEL, tied=True)).read_bytes == 2 * (WEIGHTS - 800)
    assert SERVING.memory(3, 50, 1) == 2 * WEIGHTS + 3 * 50 * PAIR * 9 / 8 + 1000
    assert SERVING.memory(3, 50, 4) == 2 * WEIGHTS + 3 * (20 + 32) * PAIR * 9 / 8 + 1000
    both = replace(SERVING, tp=2)
    assert both.memory(3, 50, 4) - 1000 == (SERVING.memory(3, 50, 4) - 1000) / 2
    assert replace(SERVING, element=4).memory(1, 9, 1) - 1000 == 2 * (SERVING.memory(1, 9, 1) - 1000)


def test_seconds_by_hand() -> None:
    """Catches: an embedding that is read, chains that share their pairs, a message too few."""
    reading = (2 * (WEIGHTS - 800) + 3 * 20 * PAIR) / 50
    assert SERVING.step_seconds(3, 50, 4) == pytest.approx(reading)
    assert replace(SERVING, fixed_seconds=0.5).step_seconds(3, 50, 4) == pytest.approx(reading + 0.5)
    message = 0.25 + 2 * 1 / 2 * 3 * 8 * 2 / 500
    assert replace(SERVING, tp=2).step_seconds(3, 50, 4) == pytest.approx(reading / 2 + 8 * message)
    slow = replace(SERVING, device=replace(DEVICE, flops=1.0))
    flops = 2 * 3 * (4 * 768 + 800 + 2 * 4 * 16 * 20)
    assert slow.step_seconds(3, 50, 4) == pytest.approx(flops / 0.5)
    with pytest.raises(ValueError, match="--tp is 3, expected a divisor of 4 query and 2 KV heads"):
        replace(SERVING, tp=3)


@pytest.mark.parametrize("cr", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize(
    ("memory", "seconds"), [(30000, 1e9), (1e9, 250.0), (30000, 250.0), (1e9, 1e9), (10, 1e9), (1e9, 10.0)]
)
def test_the_longest_is_the_longest(chains: int, cr: float, memory: float, seconds: float) -> None:
    """Compares with trying every length. Catches: an off-by-one, a limit of the wrong name."""
    found = longest(SERVING, chains, cr, memory, seconds)
    lengths = range(1, MODEL.positions + 1)
    too_large = [tokens for tokens in lengths if SERVING.memory(chains, tokens, cr) > memory]
    too_slow = [tokens for tokens in lengths if SERVING.step_seconds(chains, tokens, cr) > seconds]
    first = {"memory": min(too_large, default=301), "time": min(too_slow, default=301)}
    assert found.tokens == min(first.values()) - 1
    expected = "positions" if found.tokens == 300 else min(first, key=lambda name: first[name])
    assert found.limit == expected
    assert found.dense_memory == SERVING.memory(chains, found.tokens, 1)


def test_more_is_never_less() -> None:
    """A higher CR, more memory or more time never mean fewer tokens; more chains mean fewer."""
    long = replace(SERVING, model=replace(MODEL, positions=10**6))

    def tokens(chains: int = 2, cr: float = 4.0, memory: float = 60000, seconds: float = 1e9) -> int:
        return longest(long, chains, cr, memory, seconds).tokens

    assert tokens(cr=1) < tokens(cr=2) < tokens(cr=4)
    assert tokens(chains=3) < tokens() < tokens(memory=80000)
    assert tokens(seconds=250.0) < tokens(seconds=300.0) <= tokens()
