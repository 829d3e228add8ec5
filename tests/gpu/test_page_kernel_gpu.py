"""The Triton kernels of paged attention on CUDA: the cases of the CPU test, and what only a GPU can show."""

import pytest
import torch

from megatron_dms.hf.page_kernel_dms import attend_pages_triton
from tests.support.page_cases import CASES, Case, PageInputs, grown, make_inputs, reference, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_match_the_reference(case: Case) -> None:
    """Catches: what the interpreter cannot show: TF32 in place of fp32, tiles laid out wrongly, pages written
    by programs that race. The second call must agree in every bit."""
    inputs = make_inputs(case, "cuda")
    out_NRD = attend_pages_triton(*inputs)
    torch.testing.assert_close(out_NRD.double().cpu(), reference(inputs), rtol=0, atol=tolerance(case))
    assert torch.equal(out_NRD, attend_pages_triton(*inputs))
    assert torch.equal(out_NRD, attend_pages_triton(*grown(inputs)))


def test_nothing_waits_for_the_device() -> None:
    """Catches: a .item(), a mask used as an index, a copy to the host."""
    inputs = make_inputs(CASES[0], "cuda")
    attend_pages_triton(*inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend_pages_triton(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_with_other_pages() -> None:
    """The graph is captured once, then replayed after queries, pairs, owners and fills have changed in
    place. Catches: page bounds found on the host, which a graph would keep as they were at capture."""
    case = Case("graph", R=4, D=128, dtype=torch.bfloat16)
    inputs = make_inputs(case, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend_pages_triton(*inputs)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_NRD = attend_pages_triton(*inputs)
    for seed, pages in ((0, case.pages), (1, (9, 0, 5, 4, 3, 3)), (2, (0, 0, 0, 0, 0, 24))):
        changed = make_inputs(Case("changed", R=4, D=128, pages=pages, dtype=case.dtype), "cuda", seed)
        for tensor, new in zip(inputs[:5], changed[:5], strict=True):
            tensor.copy_(new)
        graph.replay()
        assert torch.equal(out_NRD, attend_pages_triton(*changed))
        torch.testing.assert_close(
            out_NRD.double().cpu(), reference(changed), rtol=0, atol=tolerance(case), msg=f"seed {seed}"
        )


def test_offsets_beyond_32_bits() -> None:
    """The pool has more than 2**31 numbers, and its last page is in use. Catches: page offsets in 32 bits."""
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("less than 6 GiB of GPU memory free")
    P, S, D = 2**15 + 2, 256, 256
    small = make_inputs(Case("small", N=2, R=1, D=D, S=S, pages=(1, 1), free=0, dtype=torch.bfloat16), "cuda")
    pool_PSD = torch.empty(P, S, D, dtype=torch.bfloat16, device="cuda")  # keys and values in one
    owner_P = torch.full((P,), 2, device="cuda")
    fill_P = torch.full((P,), S, dtype=torch.int32, device="cuda")
    for page, place in ((0, 1), (1, P - 1)):
        pool_PSD[place], owner_P[place] = small.keys_PSD[page], small.owner_P[page]
        fill_P[place] = small.fill_P[page]
    out_NRD = attend_pages_triton(small.q_NRD, pool_PSD, pool_PSD, owner_P, fill_P, small.scale)
    expected_NRD = reference(small._replace(values_PSD=small.keys_PSD))
    torch.testing.assert_close(out_NRD.double().cpu(), expected_NRD, rtol=0, atol=2e-2)


def test_tensors_on_another_than_the_current_device() -> None:
    """A model may be spread over devices. Catches: a launch on the current device instead of the tensors'
    own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    inputs: PageInputs = make_inputs(CASES[0], "cuda:1")
    out_NRD = attend_pages_triton(*inputs)
    torch.testing.assert_close(out_NRD.double().cpu(), reference(inputs), rtol=0, atol=1e-5)
