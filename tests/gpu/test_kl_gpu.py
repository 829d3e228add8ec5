"""The distillation losses on CUDA: their Triton rows on the cases of the CPU test, memory, and waiting."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dms.benchmarks.measuring import Memory
from megatron_dms.kernels import linear_kl as linear_kl_module
from megatron_dms.kernels.kl import distillation_kl
from megatron_dms.kernels.linear_kl import linear_kl
from tests.support.kl_cases import (
    BF16,
    CASES,
    FP32,
    FP64,
    PLAIN,
    Case,
    compare,
    fused_by_hand,
    make_logits,
    projections,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
VOCABULARY = 151936


@pytest.mark.parametrize("direction", PLAIN)
@pytest.mark.parametrize("case", [*CASES, Case("fp64", dtype=FP64)], ids=lambda case: case.name)
def test_kl(case: Case, direction: str) -> None:
    """Catches: what the interpreter cannot show: exponentials that are too coarse, a row that warps add up in
    any order. A second call must agree in every bit."""
    found = []
    for _ in range(2):
        student, teacher, weights = make_logits(case, DEVICE)
        student.requires_grad_()
        loss = distillation_kl(student, teacher, direction, case.columns, case.temperature)
        loss.backward(weights.to(loss.dtype))
        found.append((loss.detach(), student.grad))
    compare(case, direction, *found[0])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("direction", PLAIN)
def test_fused_projection(direction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projection runs in several chunks; the last one is not full. Catches: products in TF32, a
    chunk's rows with another chunk's strides."""
    monkeypatch.setattr(linear_kl_module, "MIN_CHUNK", 5)
    hidden, weight, *rest = (x.to(DEVICE, dtype) for x in projections())
    hidden.requires_grad_(), weight.requires_grad_()
    total, losses = linear_kl(hidden, weight, *rest, direction, 120, 1.5)
    total.backward()
    wanted, wanted_total, d_hidden, d_weight = fused_by_hand(direction, 120)
    tolerance = 1e-11 if dtype == FP64 else 1e-5
    for found, exact in (
        (losses, wanted),
        (total, wanted_total),
        (hidden.grad, d_hidden),
        (weight.grad, d_weight),
    ):
        largest = exact.abs().max().item()
        torch.testing.assert_close(found.detach().double().cpu(), exact, rtol=0, atol=tolerance * largest)


def large(tokens: int, direction: str) -> Callable[[], Tensor]:
    """Run forward and backward from bf16 logits of a real vocabulary, and return the gradient."""
    case = Case("large", dtype=BF16, shape=(tokens,), width=VOCABULARY, columns=VOCABULARY)
    student, teacher, weights = make_logits(case, DEVICE)
    student.requires_grad_()

    def run() -> Tensor:
        loss = distillation_kl(student, teacher, direction)
        return torch.autograd.grad(loss, student, weights)[0]

    return run


@pytest.mark.parametrize("direction", PLAIN)
def test_memory_beyond_the_logits(direction: str) -> None:
    """The loss takes a thousandth of the memory of one tensor of logits. Catches: a copy of the logits, in
    whatever type."""
    tokens = 512
    run = large(tokens, direction)
    run()  # compiles
    with Memory(torch.device(DEVICE)) as memory:
        run()
    assert memory.peak < 2 * tokens * VOCABULARY / 1000


@pytest.mark.parametrize("direction", PLAIN)
def test_nothing_waits_for_the_device(direction: str) -> None:
    """Catches: a .item(), a shape that depends on numbers, a copy to the host; in both losses."""
    run = large(8, direction)
    hidden, weight, *rest = (x.to(DEVICE, FP32) for x in projections())
    hidden.requires_grad_(), weight.requires_grad_()

    def fused() -> None:
        linear_kl(hidden, weight, *rest, direction)[0].backward()

    run(), fused()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(), fused()
    finally:
        torch.cuda.set_sync_debug_mode("default")
