"""The Triton kernels of paged attention without a GPU: in Triton's interpreter, and compiled for sm_90.

Each needs triton imported under other settings, so each runs once, in a process of its own
(page_kernel_run.py). That nothing here skips where triton is missing is on purpose: PyTorch for Linux brings
it, and constraints.txt pins it.
"""

import json
import sys

import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from megatron_dms.hf import page_kernel_dms
from tests.support.page_cases import CASES, FULL, GROWN_CASES, Case, make_inputs, reference, tolerance
from tests.support.page_kernel_run import COMPILED
from tests.support.sm90 import NAMES
from tests.support.triton_process import ROOT, run

RUN = ROOT / "tests" / "support" / "page_kernel_run.py"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("interpreted")
    return torch.load(run(RUN, "interpret", out=folder / "out.pt", TRITON_INTERPRET="1"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return json.loads(run(RUN, "compile", out=tmp_path_factory.mktemp("compiled") / "out.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreted_kernels_match_the_reference(case: Case, interpreted: dict[str, torch.Tensor]) -> None:
    """Catches: a load of v masked by D only (0 * NaN), a page's sums not shrunk to the new largest score, the
    row of another query head, pages of the next head, -inf - -inf of empty pages, a page seen in one tile
    only, a padded channel in the result."""
    out_NRD, inputs = interpreted[case.name], make_inputs(case)
    assert out_NRD.dtype == case.dtype and out_NRD.shape == inputs.q_NRD.shape
    torch.testing.assert_close(out_NRD.double(), reference(inputs), rtol=0, atol=tolerance(case))


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWN_CASES)
def test_free_pages_change_no_bit(name: str, interpreted: dict[str, torch.Tensor]) -> None:
    """Makes two calls, the second in a larger pool. Catches: a sum whose order depends on the pool's size,
    or on what was in memory before (torch.empty gives NaN in that process)."""
    assert torch.equal(interpreted[name], interpreted[f"{name}, grown"])


@pytest.mark.slow
def test_nan_in_a_valid_pair_is_seen(interpreted: dict[str, torch.Tensor]) -> None:
    """Catches: `total > 0` for `total == 0` in the second kernel, which would answer 0 instead of NaN."""
    assert interpreted["NaN in head 2"].isnan().any(dim=(1, 2)).tolist() == [n == 2 for n in range(6)]


@pytest.mark.slow
def test_fill_over_the_page_reads_no_other_page(interpreted: dict[str, torch.Tensor]) -> None:
    """Catches: fill not cut to S, which reads into the page behind."""
    assert torch.equal(interpreted["fill over S"], interpreted[FULL.name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", COMPILED, ids=lambda variant: "R={} S={} D={} {}".format(*variant[:3], NAMES[variant[3]])
)
def test_kernels_compile_for_sm90(variant: tuple, compiled: dict[str, dict]) -> None:
    """Catches: what the interpreter takes and the compiler refuses (a dot over fewer than 16 channels, a
    loop variable that changes its type), fp32 cut to TF32, 16-bit types off the tensor cores, an atomic,
    registers spilled to memory, more shared memory than a block has."""
    R, S, D, dtype = variant
    for kernel in ("_attend_page", "_combine_pages"):
        found = compiled[f"{kernel} R={R} S={S} D={D} {NAMES[dtype]}"]
        assert found["ptx_target"].startswith("sm_90")
        assert found["STACK"] == found["LOCAL"] == 0, "spilled"
        assert found["shared"] <= 64 * 1024  # of 227 KiB: three blocks fit on a multiprocessor
        assert not found["atomics"] and not found["tf32"]
        assert found["mma"] == (kernel == "_attend_page" and dtype != torch.float32)


GOOD = Case("good", N=2, R=2, D=16, pages=(1, 2), free=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"q_NRD": i.q_NRD[0]}, r"q_NRD is \[2, 16\]"),
        (lambda i: {"keys_PSD": i.keys_PSD[..., :8]}, "keys_PSD has head size 8 and q_NRD 16"),
        (lambda i: {"values_PSD": i.values_PSD[:-1]}, r"values_PSD is \[3, 16, 16\].*\[4, 16, 16\]"),
        (lambda i: {"owner_P": i.owner_P[:-1]}, r"owner_P is \[3\].*\[4\]"),
        (lambda i: {"fill_P": i.fill_P[:, None]}, r"fill_P is \[4, 1\].*\[4\]"),
        (lambda i: {"q_NRD": torch.zeros(2, 33, 16)}, "R is 33"),
        (lambda i: {"q_NRD": torch.zeros(2, 0, 16)}, "R is 0"),
        (lambda i: pools(12) | {"q_NRD": torch.zeros(2, 2, 12)}, "head size of 12"),
        (lambda i: pools(264) | {"q_NRD": torch.zeros(2, 2, 264)}, "head size of 264"),
        (lambda i: pools(16, S=24), "S is 24"),
        (lambda i: pools(16, S=8), "S is 8"),
        (lambda i: pools(16, S=512), "S is 512"),
        (lambda i: {"q_NRD": i.q_NRD.double()}, "q_NRD is torch.float64"),
        (lambda i: {"keys_PSD": i.keys_PSD.half()}, "keys_PSD is torch.float16, expected torch.float32"),
        (lambda i: {"values_PSD": i.values_PSD.bfloat16()}, "values_PSD is torch.bfloat16"),
        (lambda i: {"owner_P": i.owner_P.int()}, "owner_P is torch.int32, expected torch.int64"),
        (lambda i: {"fill_P": i.fill_P.long()}, "fill_P is torch.int64, expected torch.int32"),
        (lambda i: {"fill_P": i.fill_P.to("meta")}, "fill_P is on meta, expected cpu"),
        (lambda i: {"q_NRD": i.q_NRD.mT.contiguous().mT}, "q_NRD has strides .*contiguous"),
        (lambda i: {"keys_PSD": torch.zeros(4, 16, 32)[..., ::2]}, "keys_PSD has strides"),
        (lambda i: {"owner_P": torch.zeros(8, dtype=torch.int64)[::2]}, "owner_P has strides"),
        (lambda i: {"values_PSD": i.values_PSD.requires_grad_()}, "values_PSD requires a gradient"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(change, message: str) -> None:
    """Catches: a check that is missing (the kernels see addresses only, and would read other memory)."""
    inputs = make_inputs(GOOD)
    page_kernel_dms._check(*inputs[:5], interpreted=True)
    with pytest.raises(ValueError, match=message):
        page_kernel_dms._check(*inputs._replace(**change(inputs))[:5], interpreted=True)


def pools(D: int, S: int = 16) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(4, S, D) for name in ("keys_PSD", "values_PSD")}


def test_cpu_is_refused_outside_the_interpreter() -> None:
    """Catches: CPU tensors handed to the GPU launcher, whose own message is about pointers."""
    with pytest.raises(ValueError, match="q_NRD is on cpu, expected a CUDA device"):
        page_kernel_dms._check(*make_inputs(GOOD)[:5], interpreted=False)


def test_export_loads_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an import of triton outside `try`, for which transformers refuses to load the export, and a
    missing triton reported in other words than these."""
    assert "triton" not in get_imports(page_kernel_dms.__file__)
    page_kernel_dms._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"attend_pages_triton needs triton.*install triton"):
        page_kernel_dms.attend_pages_triton(*make_inputs(GOOD))
