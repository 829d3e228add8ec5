"""Training attention on CUDA against the dense reference in fp64 on the CPU.

The cases are those of the CPU tests, and a few that only a GPU can show.
"""

from dataclasses import replace

import pytest
import torch

from megatron_dms.benchmarks.attention import Shape, drawn
from megatron_dms.kernels import attention_backend
from tests.support.attention_cases import (
    BF16,
    CASES,
    FP32,
    PARTS,
    Case,
    compare,
    expected,
    make_inputs,
    results,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"
FLASH_CASES = [case for case in CASES if case.dtype != FP32 and case.D % 8 == 0]
FLASH_CASES += [  # the CPU runs these in fp32
    replace(case, name=f"{case.name}, in bf16", dtype=BF16)
    for case in CASES
    if case.dtype == FP32 and case.D % 8 == 0 and case.D <= 248
]
LONG = Case("long", T=32768, window=512, H=8, G=2, D=128, dtype=BF16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton(case: Case) -> None:
    """Catches: what the interpreter cannot show: TF32 in place of fp32, tiles laid out wrongly, programs that
    race. A second call must agree in every bit."""
    inputs = make_inputs(case, DEVICE)
    attend = attention_backend("triton")
    found = results(attend, case, *inputs)
    compare(case, found, expected(case, *inputs))
    again = results(attend, case, *inputs)
    for name in PARTS:
        assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize("case", FLASH_CASES, ids=lambda case: case.name)
def test_flash(case: Case) -> None:
    """Catches: a log-sum-exp or window that CUDA's operators mean otherwise than the CPU's, padding of rows
    that they leave unwritten."""
    inputs = make_inputs(case, DEVICE)
    compare(case, results(attention_backend("flash"), case, *inputs), expected(case, *inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flex(case: Case) -> None:
    """Catches: a gradient of the decisions that compilation loses, another head's bias."""
    torch.compiler.reset()  # it compiles for eight shapes, and would then go on without compiling
    inputs = make_inputs(case, DEVICE)
    compare(case, results(attention_backend("flex"), case, *inputs), expected(case, *inputs))


@pytest.mark.parametrize("name", ["triton", "flash"])
def test_nothing_waits_for_the_device(name: str) -> None:
    """Runs forward and backward. Catches: a .item(), a mask used as an index, a copy to the host."""
    case = replace(CASES[0], dtype=BF16)
    inputs = make_inputs(case, DEVICE)
    results(attention_backend(name), case, *inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(attention_backend(name), case, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_long_context() -> None:
    """32K tokens at CR 8 give finite numbers, and those of flash. Catches: sums in half precision over
    long rows, survivors beyond the first thousands, a launch grid or an index that is too small."""
    q, k, v, log_keep, grad = make_inputs(LONG, DEVICE)
    shape = Shape(LONG.B, LONG.H, LONG.G, LONG.D, LONG.window)
    (log_keep,) = drawn(8, shape, LONG.T, log_keep.device).layers
    inputs = (q, k, v, log_keep.requires_grad_(), grad)
    by_flash = results(attention_backend("flash"), LONG, *inputs)
    found = results(attention_backend("triton"), LONG, *inputs)
    print(compare(LONG, found, {name: part.double().cpu() for name, part in by_flash.items()}))


def test_offsets_beyond_32_bits() -> None:
    """The queries have more than 2**31 numbers; the last sample is compared with itself alone. Catches:
    offsets in 32 bits."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of GPU memory free")
    many = Case("many", B=33, H=128, G=1, T=4096, D=128, window=64, dtype=BF16)
    one = replace(many, B=1)
    inputs = make_inputs(one, DEVICE)
    wide = [x.detach().expand(many.B, *x.shape[1:]).contiguous().requires_grad_() for x in inputs[:4]]
    attend = attention_backend("triton")
    found = results(attend, many, *wide, inputs[4].expand(many.B, *inputs[4].shape[1:]).contiguous())
    for name, part in results(attend, one, *inputs).items():
        assert torch.equal(found[name][-1:], part), name
