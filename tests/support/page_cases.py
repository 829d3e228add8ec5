"""Cases, inputs and a plain fp64 reference for attention over pages, for the CPU and the GPU tests.

In every case, each slot without a valid pair is NaN, and so is every free page. Shapes are those of
page_kernel_dms.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    name: str
    N: int = 6
    R: int = 4
    D: int = 64
    S: int = 16
    pages: tuple[int, ...] = (1, 2, 3, 9, 4, 5)
    """Pages of each head; 0 = the head owns none."""
    free: int = 3
    fill: str = "mixed"
    """mixed: 1..S valid pairs; full: S everywhere; empty: the pages of even heads hold nothing yet."""
    peak: float | None = None
    """Scale the scores so that the largest is this, in absolute value."""
    rising: bool = False
    """Keys grow with the index of their page, so that the largest score stands in the last pages."""
    dtype: torch.dtype = torch.float32


class PageInputs(NamedTuple):
    q_NRD: Tensor
    keys_PSD: Tensor
    values_PSD: Tensor
    owner_P: Tensor
    fill_P: Tensor
    scale: float


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case("plain"),
    Case("one head, one page", N=1, R=1, pages=(1,), free=0),
    Case("one head, nine pages", N=1, R=8, D=128, pages=(9,)),
    Case("MHA", R=1, D=128),
    Case("GQA 8", R=8, D=128, S=64),
    Case("R no power of two", R=7, D=64),
    Case("R over one tile", N=2, R=20, D=64, pages=(2, 3)),
    Case("head size 80", D=80),
    Case("head size 80, S 64, GQA 8", D=80, S=64, R=8),
    Case("head size 96", D=96, N=2, pages=(1, 3)),
    Case("head size 8", D=8, N=2, pages=(1, 3)),
    Case("head size 256, two tiles a page", D=256, S=32, N=2, pages=(2, 3)),
    Case("S 256, tiles not reached", D=128, S=256, N=2, pages=(2, 3)),
    Case("full pages", fill="full", free=0),
    Case("empty heads", pages=(0, 2, 0, 0, 1, 0)),
    Case("no head has a page", pages=(0,) * 6, free=4),
    Case("an empty pool", pages=(0,) * 6, free=0),
    Case("empty pages", fill="empty"),
    Case("scores of 60", D=128, S=64, peak=60.0),
    Case("scores of 60, small pages", D=64, S=16, R=1, peak=60.0),
    Case("more pages than one tile of the second kernel", N=2, R=1, D=8, pages=(131, 2), rising=True),
    Case("bf16", dtype=BF16),
    Case("bf16, GQA 8, D 128, S 64", R=8, D=128, S=64, dtype=BF16),
    Case("bf16, D 80, scores of 60", R=1, D=80, peak=60.0, dtype=BF16),
    Case("fp16", dtype=FP16),
    Case("fp16, D 128, S 64, scores of 60", D=128, S=64, peak=60.0, dtype=FP16),
]
FULL = next(case for case in CASES if case.name == "full pages")
GROWN_CASES = ("plain", "full pages", "bf16")
TOLERANCE = {torch.float32: 1e-5, BF16: 2e-2, FP16: 2.5e-3}


def tolerance(case: Case) -> float:
    """Return the largest |out - reference| allowed, with values from N(0, 1) and |out| < 4.

    The 16-bit types round each weight once and the result once more: half a unit in the last place of 2..4
    is 8e-3 in bf16 and 1e-3 in fp16. An fp32 score of 60 is off by up to a few 60 * 2**-24, and its weight
    by the same relative error.
    """
    return 3e-5 if case.peak is not None and case.dtype == torch.float32 else TOLERANCE[case.dtype]


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> PageInputs:
    """Return random inputs of a case; one seed gives the same inputs in any process."""
    random = torch.Generator().manual_seed(seed)
    P = sum(case.pages) + case.free
    owner_P = torch.tensor([n for n, pages in enumerate(case.pages) for _ in range(pages)], dtype=torch.int64)
    owner_P = torch.cat([owner_P, torch.full((case.free,), case.N)])[torch.randperm(P, generator=random)]
    fill_P = torch.randint(1, case.S + 1, (P,), generator=random, dtype=torch.int32)
    if case.fill == "full":
        fill_P.fill_(case.S)
    elif case.fill == "empty":
        fill_P[owner_P % 2 == 0] = 0
    q_NRD = torch.randn(case.N, case.R, case.D, generator=random).to(case.dtype)
    keys_PSD, values_PSD = (torch.randn(P, case.S, case.D, generator=random) for _ in range(2))
    if case.rising:
        keys_PSD *= torch.linspace(0.1, 4, P)[:, None, None]
    keys_PSD, values_PSD = keys_PSD.to(case.dtype), values_PSD.to(case.dtype)
    scale = case.D**-0.5
    if case.peak is not None:
        scores = torch.einsum("nrd,psd->nrps", q_NRD.double(), keys_PSD.double())
        scale = case.peak / scores.abs().max().item()
    unused_PS = (torch.arange(case.S) >= fill_P[:, None]) | (owner_P == case.N)[:, None]
    keys_PSD[unused_PS] = torch.nan
    values_PSD[unused_PS] = torch.nan
    tensors = (q_NRD, keys_PSD, values_PSD, owner_P, fill_P)
    return PageInputs(*(tensor.to(device) for tensor in tensors), scale)


def grown(inputs: PageInputs) -> PageInputs:
    """Return the inputs in a pool with four more pages, all free, as after the cache has grown."""
    extra = (4, *inputs.keys_PSD.shape[1:])
    keys_PSD, values_PSD = (
        torch.cat([pool, pool.new_full(extra, torch.nan)]) for pool in (inputs.keys_PSD, inputs.values_PSD)
    )
    owner_P = torch.cat([inputs.owner_P, inputs.owner_P.new_full((4,), len(inputs.q_NRD))])
    fill_P = torch.cat([inputs.fill_P, inputs.fill_P.new_full((4,), extra[1])])
    return PageInputs(inputs.q_NRD, keys_PSD, values_PSD, owner_P, fill_P, inputs.scale)


def reference(inputs: PageInputs) -> Tensor:
    """Return the output [N, R, D] in fp64 on the CPU: one softmax over the valid pairs of each head."""
    q_NRD, keys_PSD, values_PSD, owner_P, fill_P = (tensor.cpu() for tensor in inputs[:5])
    out_NRD = torch.zeros(q_NRD.shape, dtype=torch.float64)
    for n in range(len(q_NRD)):
        pages = [int(page) for page in (owner_P == n).nonzero()]
        if sum(int(fill_P[page]) for page in pages) == 0:
            continue
        k_KD = torch.cat([keys_PSD[page, : fill_P[page]] for page in pages]).double()
        v_KD = torch.cat([values_PSD[page, : fill_P[page]] for page in pages]).double()
        out_NRD[n] = (q_NRD[n].double() @ k_KD.T * inputs.scale).softmax(dim=-1) @ v_KD
    return out_NRD
