"""Every attention back-end against the dense reference in fp64, gradients of q, k, v and log_keep included.

The Triton kernels run in Triton's interpreter, and are compiled for sm_90, in processes of their own
(attention_run.py). FlexAttention has no backward on CPU: its gradients are in tests/gpu.
"""

import json
import math
from argparse import Namespace

import pytest
import torch
from torch import Tensor

from megatron_dms.config import DMSConfig
from megatron_dms.kernels import BACKENDS, attention_backend, backend_name
from megatron_dms.kernels.survivors import THRESHOLD, find_survivors
from megatron_dms.ops.attention import dms_attention
from tests.support.attention_cases import CASES, FP32, PARTS, Case, compare, expected, make_inputs, results
from tests.support.attention_run import COMPILED, TWICE
from tests.support.sm90 import NAMES
from tests.support.triton_process import ROOT, run

RUN = ROOT / "tests" / "support" / "attention_run.py"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    return torch.load(
        run(RUN, "interpret", out=tmp_path_factory.mktemp("run") / "out.pt", TRITON_INTERPRET="1")
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return json.loads(run(RUN, "compile", out=tmp_path_factory.mktemp("compiled") / "out.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton(case: Case, interpreted: dict[str, dict[str, Tensor]]) -> None:
    """Catches: a window, a block's bound or a survivor off by one, a bias of another head or in another base,
    a gradient of a key that two programs own or none, the query heads of a group not added up."""
    compare(case, interpreted[case.name], expected(case, *make_inputs(case)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flash(case: Case) -> None:
    """Catches: the two parts joined with the wrong weights, their own log-sum-exp in the backward, the shift
    of queries against keys off by one, a bias cut to bf16."""
    inputs = make_inputs(case)
    compare(case, results(attention_backend("flash"), case, *inputs), expected(case, *inputs))


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == FP32], ids=lambda case: case.name)
def test_flex_forward(case: Case) -> None:
    """Catches: a bias of another head, a window off by one, a mask that is not causal."""
    *parts, _ = (x.detach() for x in make_inputs(case))
    found = attention_backend("flex")(*parts, case.window)
    torch.testing.assert_close(
        found.double(), dms_attention(*(x.double() for x in parts), case.window), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_triton_is_deterministic(interpreted: dict[str, dict[str, Tensor]]) -> None:
    """Catches: sums in an order that changes (on a GPU, see tests/gpu), and anything read before written."""
    for name in PARTS:
        assert torch.equal(interpreted[TWICE][name], interpreted["again"][name])


@pytest.mark.slow
def test_what_the_threshold_leaves_out(interpreted: dict[str, dict[str, Tensor]]) -> None:
    """The default threshold leaves out nothing that fp32 can show; with all keys negligible, a sliding
    window remains. Catches: a threshold that is ignored, or compared the wrong way round."""
    case = next(case for case in CASES if case.name == TWICE)
    exact, default = interpreted["nothing is negligible"], interpreted[TWICE]
    for name in PARTS:
        torch.testing.assert_close(
            default[name], exact[name], rtol=0, atol=2e-6 * exact[name].abs().max().item()
        )
    q, k, v, log_keep, grad = make_inputs(case)
    window_only = expected(case, q, k, v, torch.full_like(log_keep, -math.inf), grad)
    compare(case, interpreted["all is negligible"], window_only)


def test_survivors() -> None:
    """Compares with survivors worked out by hand. Catches: an order that is not ascending, counts off by
    one, a strict comparison."""
    log_keep = torch.tensor([[[0.0, -50.0, -1.0, THRESHOLD, -math.inf], [-99.0] * 5, [-0.1] * 5]])
    order, before = find_survivors(log_keep)
    assert order.tolist() == [[[0, 2, 3, 1, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]]
    assert before.tolist() == [[[0, 1, 1, 2, 3, 3], [0] * 6, [0, 1, 2, 3, 4, 5]]]
    assert order.dtype == before.dtype == torch.int32
    assert find_survivors(log_keep * math.nan).before_BGS[..., -1].tolist() == [
        [5, 5, 5]
    ]  # NaN is not hidden
    assert find_survivors(log_keep, -60.0).before_BGS[0, 0].tolist() == [0, 1, 2, 3, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPILED, ids=lambda variant: f"D={variant[0]} {NAMES[variant[1]]}")
def test_kernels_compile_for_sm90(variant: tuple, compiled: dict[str, dict]) -> None:
    """Catches: what the interpreter takes and the compiler refuses, fp32 cut to TF32, 16-bit types off the
    tensor cores, an atomic, more shared memory than a block has (227 KiB), many registers spilled."""
    D, dtype = variant
    large = ("attend_queries", "query_gradients", "key_gradients")
    for kernel in (*large, "pack_survivors", "query_sums", "row_sums", "row_slopes"):
        found = compiled[f"{kernel} D={D} {NAMES[dtype]}"]
        assert found["ptx_target"].startswith("sm_90")
        assert found["shared"] <= 227 * 1024
        assert not found["atomics"] and not found["tf32"]
        if dtype != FP32:  # fp32 is there to be exact, not to be fast
            assert found["mma"] == (kernel in large)
            assert found["STACK"] <= 128, "spilled"


@pytest.mark.parametrize("name", ["flash", "flex", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (4, 9, 16)}, r"expected q \[B,H,T,D\].*\(4, 9, 16\)"),
        ({"q": (1, 3, 9, 16)}, "H a multiple of G"),
        ({"k": (1, 2, 8, 16)}, r"k \(1, 2, 8, 16\)"),
        ({"v": (1, 2, 9, 8)}, r"v \(1, 2, 9, 8\)"),
        ({"log_keep": (1, 4, 9)}, r"log_keep \(1, 4, 9\)"),
        ({"window": -1}, "window is -1"),
        ({"dtype": torch.float64}, "of one type and log_keep in fp32.*float64"),
        ({"device": "meta"}, "on one device.*k on meta"),
    ],
)
def test_bad_inputs_are_refused(name: str, change: dict, message: str) -> None:
    """Catches: a check that is missing (kernels see addresses only, and would read other memory)."""
    shapes = {"q": (1, 4, 9, 16), "k": (1, 2, 9, 16), "v": (1, 2, 9, 16), "log_keep": (1, 2, 9)} | change
    tensors = {key: torch.zeros(shapes[key]) for key in ("q", "k", "v", "log_keep")}
    if "dtype" in change:
        tensors["v"] = tensors["v"].to(change["dtype"])
    if "device" in change:
        tensors["k"] = tensors["k"].to(change["device"])
    with pytest.raises(ValueError, match=message):
        attention_backend(name)(**tensors, window=change.get("window", 3))


def test_triton_refuses_what_it_cannot_take() -> None:
    """Catches: CPU tensors handed to the GPU launcher, whose own message is about pointers."""
    attend = attention_backend("triton")
    good = [torch.zeros(1, 2, 9, 16)] * 3 + [torch.zeros(1, 2, 9)]
    with pytest.raises(ValueError, match="q is on cpu, the triton back-end needs CUDA"):
        attend(*good, 3)
    with pytest.raises(ValueError, match=r"q is torch.float64"):
        attend(*(x.double() for x in good[:3]), good[3], 3)
    with pytest.raises(ValueError, match="head size 264"):
        attend(*[torch.zeros(1, 2, 9, 264)] * 3, good[3], 3)


def test_flash_in_fp32_is_refused_on_cuda_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a mistake that is found in the first forward, with both models loaded."""
    from megatron_dms.errors import StartupError
    from megatron_dms.training.checks import check_attention_backend
    from megatron_dms.upstream import cpu

    flash = DMSConfig(attention_backend="flash")
    fp32, bf16 = Namespace(bf16=False, fp16=False), Namespace(bf16=True, fp16=False)
    monkeypatch.setattr(cpu, "installed", lambda: False)
    with pytest.raises(StartupError, match="flash in fp32: on CUDA"):
        check_attention_backend(fp32, flash)
    check_attention_backend(bf16, flash)
    check_attention_backend(fp32, DMSConfig(attention_backend="triton"))
    monkeypatch.setattr(cpu, "installed", lambda: True)
    check_attention_backend(fp32, flash)


def test_names() -> None:
    """Catches: a silent fallback, and a default other than the one that is documented."""
    with pytest.raises(ValueError, match="back-end is 'fast', expected one of"):
        attention_backend("fast")
    assert attention_backend("dense") is dms_attention
    assert sorted(BACKENDS) == ["dense", "flash", "flex", "triton"]
    assert (backend_name("auto", "cuda:1"), backend_name("auto", "cpu")) == ("triton", "dense")
    assert backend_name("flash", "cuda") == "flash"
