"""Cases, inputs and fp64 references of training attention, for the CPU and the GPU tests.

A tolerance is relative to the largest number of the reference tensor. If that number is small because its
terms cancel, the tolerance is relative to a tenth of the largest number of all reference tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dms.ops.attention import dms_attention

PARTS = ("out", "dq", "dk", "dv", "dlog_keep")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# fp32: roundings of long sums. Half types: the weights and the gradients of scores are rounded
# before they are multiplied, and so is the output, from which the backward gets its row sums.
RELATIVE = {FP32: 5e-6, FP16: 4e-3, BF16: 3e-2}


@dataclass(frozen=True)
class Case:
    name: str
    T: int = 150
    window: int = 16
    B: int = 1
    H: int = 4
    G: int = 2
    D: int = 32
    dtype: torch.dtype = FP32
    decisions: str = "random"
    """random: from kept to evicted for good; kept; evicted; soft: none negligible; one: key 5 of head 0."""
    peak: float | None = None
    """Scale the scores so that the largest is this, in absolute value."""
    layout: str = "torch"
    """torch: contiguous; megatron: in memory [T, B, heads, D], values with one channel more; apart: channels
    are not neighbours in memory, and the gradient of the output is one number for all."""


CASES = [
    Case("plain"),
    Case("MHA", H=2),
    Case("GQA 4, two samples", B=2, H=4, G=1, T=70),
    Case("GQA 8", H=8, G=1, D=16, T=70),
    Case("window 0", window=0),
    Case("window 256", window=256, T=300, H=2, D=16),
    Case("window 512", window=512, T=577, H=2, G=1, D=16),
    Case("window over T", window=200),
    Case("window T - 1", window=149, T=150),
    Case("window T - 2", window=148, T=150),
    Case("one token", T=1),
    Case("two tokens, window 0", T=2, window=0),
    Case("T 64, a whole block", T=64),
    Case("T 65", T=65),
    Case("all kept", decisions="kept"),
    Case("all evicted", decisions="evicted"),
    Case("all evicted, window 0", decisions="evicted", window=0),
    Case("none negligible", decisions="soft", window=5),
    Case("one surviving key", decisions="one", window=7),
    Case("scores of 60", peak=60.0),
    Case("scores of 60, none negligible", peak=60.0, decisions="soft", window=0),
    Case("head size 16", D=16),
    Case("head size 40", D=40, H=2, G=1),
    Case("head size 80", D=80, H=2, G=1),
    Case("head size 96", D=96, H=2, G=1),
    Case("head size 128", D=128, H=2, G=1),
    Case("head size 256", D=256, H=1, G=1, T=70),
    Case("Megatron's layout", layout="megatron", B=2, T=70),
    Case("channels apart, gradient of a sum", layout="apart", B=2, T=70),
    Case("channels apart, window over T", layout="apart", T=70, window=80),
    Case("a window of 2**31 - 1", T=70, window=2**31 - 1),
    Case("bf16", dtype=BF16, D=64, T=200),
    Case("bf16, Megatron's layout, head size 128", dtype=BF16, layout="megatron", D=128, H=2, G=1, T=200),
    Case("bf16, scores of 60", dtype=BF16, peak=60.0, T=200),
    Case("fp16, head size 80", dtype=FP16, D=80, H=2, G=1, T=200),
    Case("bf16, T 4097", dtype=BF16, T=4097, window=256, H=1, G=1, D=16),
]


def make_inputs(
    case: Case, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and log_keep (leaves that want gradients), and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int, channels: int) -> Tensor:
        return torch.randn(case.B, heads, case.T, channels, generator=generator)

    q, k, v, grad = (randn(heads, case.D) for heads in (case.H, case.G, case.G, case.H))
    if case.peak is not None:
        grouped = q.view(case.B, case.G, -1, case.T, case.D)
        largest = torch.einsum("bgrid,bgjd->bgrij", grouped, k).abs().max() * case.D**-0.5
        q = q * (case.peak / largest)
    scores = 60 * torch.randn(case.B, case.G, case.T, generator=generator)  # in units of the temperature
    log_keep = {
        "random": torch.nn.functional.logsigmoid(-scores),
        "kept": torch.zeros_like(scores),
        "evicted": torch.full_like(scores, float("-inf")),
        "soft": -scores.abs() / 6,
        "one": torch.full_like(scores, float("-inf")),
    }[case.decisions]
    if case.decisions == "one":
        log_keep[:, 0, 5] = -0.5
    if case.decisions == "random":  # a few for good, as in evaluation
        log_keep[..., ::11] = float("-inf")
    made = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        x = x.to(device, case.dtype)
        if case.layout == "apart":
            x = x.mT.contiguous().mT
        elif case.layout == "megatron":
            x = x.permute(2, 0, 1, 3).contiguous()
            if name == "v":
                x = torch.nn.functional.pad(x, (0, 1))[..., :-1]
            x = x.permute(1, 2, 0, 3)
        made.append(x.requires_grad_())
    if case.layout == "apart":
        grad = torch.ones(()).expand(grad.shape)
    return *made, log_keep.to(device).requires_grad_(), grad.to(device, case.dtype)


def results(
    attend: Callable[..., Tensor], case: Case, *inputs: Tensor, **options: object
) -> dict[str, Tensor]:
    """Return the output and the gradients of one back-end."""
    *parts, grad = inputs
    out = attend(*parts, case.window, **options)
    return dict(zip(PARTS, (out.detach(), *torch.autograd.grad(out, parts, grad)), strict=True))


def expected(case: Case, *inputs: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of the dense reference, in fp64 on the CPU."""
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    return results(dms_attention, case, *exact)


def compare(case: Case, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Assert that all parts agree; return the largest relative differences."""
    differences = {}
    overall = max(part.abs().max().item() for part in wanted.values())
    tolerance = RELATIVE[case.dtype] * (2 if case.peak else 1)  # a score of 60 has a rounding of 60
    for name in PARTS:
        assert found[name].shape == wanted[name].shape
        assert found[name].isfinite().all(), name
        largest = max(wanted[name].abs().max().item(), overall / 10)
        differences[name] = (found[name].double().cpu() - wanted[name]).abs().max().item() / largest
    assert max(differences.values()) <= tolerance, differences
    return differences
