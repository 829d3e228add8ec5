"""One decode step of attention over paged keys and values, as two Triton kernels (CUDA).

The first kernel runs one program per page. All R query heads of a group share the program's loads of keys and
values. The program leaves the page's softmax unfinished: it writes the largest score, the sum of
exp(score - largest), and the sum of the values with these weights. The second kernel joins the pages of each
head, in the order of their indices, so that a result is bit for bit the same however the programs are
scheduled.

Nothing here waits for the device, and every shape depends on shapes only. The step can be captured in a CUDA
graph once one call has compiled the kernels. Without a GPU the same code runs, slowly, in Triton's
interpreter: set TRITON_INTERPRET=1 before triton is imported.

Shapes: N heads (sequence x KV head), R query heads per KV head, D head size, P pages of S pairs each.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _BeforeImport:
    """Stand-in for triton.language until the first call; the kernels' signatures read only this name."""

    constexpr = "constexpr"


tl: Any = _BeforeImport
"""triton.language, set by _kernels, because an exported model must load where triton is not installed. It is
a global because triton looks up the names in a kernel's body among the globals of the kernel's module."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_PAGE, MAX_PAGE = 16, 256
"""Pairs in a page."""
MAX_HEAD_SIZE = 256
MAX_QUERY_HEADS = 32
"""The most query heads per KV head: their fp32 sums [R, D] stay in registers."""
MIN_DOT_SIDE = 16
"""The least size of each side of an operand of tl.dot; fewer heads or channels are padded with zeros."""
TILE_BYTES = 16384
"""Bytes of keys (and of values) that a program of the first kernel holds at a time."""
COMBINED_PAGES, COMBINED_CHANNELS = 128, 32
"""The tile of the second kernel. It has few channels, so that one long sequence still gives many programs."""


def attend_pages_triton(
    q_NRD: Tensor, keys_PSD: Tensor, values_PSD: Tensor, owner_P: Tensor, fill_P: Tensor, scale: float
) -> Tensor:
    """softmax(q . k * scale) . v over all valid pairs of the pages each head owns; fp32 inside.

    Args:
        q_NRD: queries of one new token per sequence; float32, bfloat16 or float16.
        keys_PSD, values_PSD: the pool, in the type of q. D is a multiple of 8 up to 256, S a power of two
            from 16 to 256. The pages of a head may stand anywhere.
        owner_P: int64, the head 0..N-1 that a page belongs to; any other number, N by custom, means free.
        fill_P: int32, the number of valid pairs of the page, from its start. The others are never loaded, and
            may be NaN.
        scale: multiplies the scores.

    Returns:
        [N, R, D] in the type of q, 0 for a head without pairs. No gradient flows through it.

    Raises:
        ValueError: the kernels cannot take a shape, type, device or memory layout, or an input requires a
            gradient. Numbers in owner_P and fill_P are not checked: that would wait for the device.
        ImportError: triton is not installed.
    """
    attend_page, combine_pages, interpreted = _kernels()
    _check(q_NRD, keys_PSD, values_PSD, owner_P, fill_P, interpreted)
    N, R, D = q_NRD.shape
    P, S, _ = keys_PSD.shape
    if P == 0 or q_NRD.numel() == 0:  # nothing to launch
        return torch.zeros_like(q_NRD)
    out_NRD = torch.empty_like(q_NRD)
    peak_PR = q_NRD.new_empty(P, R, dtype=torch.float32)
    total_PR = torch.empty_like(peak_PR)
    sum_PRD = q_NRD.new_empty(P, R, D, dtype=torch.float32)
    # The sort is stable, so that a head's pages are added in index order. 32 bits halve the sort's passes.
    sorted_P, order_P = torch.sort(owner_P.to(torch.int32), stable=True)
    head_bounds = torch.arange(N + 1, dtype=torch.int32, device=owner_P.device)
    first_N1 = torch.searchsorted(sorted_P, head_bounds, out_int32=True)  # head n: first[n] .. first[n + 1]
    # Triton launches on the current device, which may be another one if the model is spread over several.
    with torch.cuda.device_of(q_NRD):
        attend_page[(P,)](
            q_NRD, keys_PSD, values_PSD, owner_P, fill_P, peak_PR, total_PR, sum_PRD, float(scale), N,
            INTERPRETED=interpreted, **page_constants(R, S, D, keys_PSD.element_size()),
        )  # fmt: skip
        combine_pages[(N * R, -(-D // COMBINED_CHANNELS))](
            peak_PR, total_PR, sum_PRD, order_P, first_N1, out_NRD, **combine_constants(R, D)
        )
    return out_NRD


def page_constants(R: int, S: int, D: int, element_size: int) -> dict[str, int]:
    """Compile-time constants and launch options of the first kernel; element_size is in bytes."""
    R_PAD, D_PAD = (max(MIN_DOT_SIDE, _power_of_two(size)) for size in (R, D))
    tile_rows = TILE_BYTES // (D_PAD * element_size)
    # A page is one tile, or a few. There is nothing to pipeline, and stages would only take shared memory.
    # Two warps are enough to load 8 KiB.
    BLOCK_S = max(MIN_DOT_SIDE, min(S, tile_rows))
    num_warps = 2 if BLOCK_S * D_PAD * element_size <= TILE_BYTES // 2 else 4
    if element_size == 4:  # no tensor cores: the operands of the products are in registers, and would spill
        BLOCK_S, num_warps = MIN_DOT_SIDE, 8
    tile = {"R_PAD": R_PAD, "D_PAD": D_PAD, "BLOCK_S": BLOCK_S}
    return {"R": R, "S": S, "D": D} | tile | {"num_warps": num_warps, "num_stages": 1}


def combine_constants(R: int, D: int) -> dict[str, int]:
    """Compile-time constants and launch options of the second kernel."""
    tile = {"BLOCK_P": COMBINED_PAGES, "BLOCK_D": COMBINED_CHANNELS}
    return {"R": R, "D": D} | tile | {"num_warps": 4, "num_stages": 2}


class Kernels(NamedTuple):
    """The two kernels after triton.jit."""

    attend_page: Any
    combine_pages: Any
    interpreted: bool
    """True if TRITON_INTERPRET=1, which runs the kernels on the CPU."""


@functools.cache
def _kernels() -> Kernels:
    """Import triton and pass it the kernels, once."""
    global tl
    # transformers refuses an export if a package that it imports is missing, unless the import is in a `try`.
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise ImportError(
            "attend_pages_triton needs triton, which comes with PyTorch for CUDA on Linux; install triton"
        ) from error
    tl = triton.language
    # The number of heads changes with the batch. Triton would otherwise compile again for 1 and for multiples
    # of 16.
    attend_page = triton.jit(_attend_page, do_not_specialize=["heads"])
    return Kernels(attend_page, triton.jit(_combine_pages), not isinstance(attend_page, triton.JITFunction))


def _check(
    q_NRD: Tensor, keys_PSD: Tensor, values_PSD: Tensor, owner_P: Tensor, fill_P: Tensor, interpreted: bool
) -> None:
    """Raise a ValueError for inputs that the kernels would misread, as they see only addresses."""
    if q_NRD.dim() != 3 or keys_PSD.dim() != 3:
        raise ValueError(
            f"q_NRD is {list(q_NRD.shape)} and keys_PSD is {list(keys_PSD.shape)}, expected [N, R, D] and "
            "[P, S, D]"
        )
    (_, R, D), (P, S, key_size) = q_NRD.shape, keys_PSD.shape
    if key_size != D:
        raise ValueError(f"keys_PSD has head size {key_size} and q_NRD {D}, expected the same")
    if values_PSD.shape != keys_PSD.shape:
        raise ValueError(
            f"values_PSD is {list(values_PSD.shape)}, expected the shape of keys_PSD, {list(keys_PSD.shape)}"
        )
    for name, tensor in (("owner_P", owner_P), ("fill_P", fill_P)):
        if tensor.shape != (P,):
            raise ValueError(f"{name} is {list(tensor.shape)}, expected one entry per page, [{P}]")
    if not 1 <= R <= MAX_QUERY_HEADS:
        raise ValueError(f"R is {R} query heads per KV head, expected 1 to {MAX_QUERY_HEADS}")
    if D % 8 or not 8 <= D <= MAX_HEAD_SIZE:
        raise ValueError(f"D is a head size of {D}, expected a multiple of 8 up to {MAX_HEAD_SIZE}")
    if S != _power_of_two(S) or not MIN_PAGE <= S <= MAX_PAGE:
        raise ValueError(f"S is {S} pairs in a page, expected a power of two from {MIN_PAGE} to {MAX_PAGE}")
    if q_NRD.dtype not in DTYPES:
        raise ValueError(f"q_NRD is {q_NRD.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    dtypes = (q_NRD.dtype, q_NRD.dtype, torch.int64, torch.int32)
    others = {"keys_PSD": keys_PSD, "values_PSD": values_PSD, "owner_P": owner_P, "fill_P": fill_P}
    for (name, tensor), dtype in zip(others.items(), dtypes, strict=True):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype} beside q_NRD in {q_NRD.dtype}")
        if tensor.device != q_NRD.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {q_NRD.device}, where q_NRD is")
    if not q_NRD.is_cuda and not interpreted:
        raise ValueError(
            f"q_NRD is on {q_NRD.device}, expected a CUDA device (elsewhere: TRITON_INTERPRET=1, slow)"
        )
    for name, tensor in ({"q_NRD": q_NRD} | others).items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()} for shape {list(tensor.shape)}, expected contiguous"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which the kernels do not give: use torch.no_grad()"
            )


def _power_of_two(n: int) -> int:
    """The smallest power of two that is >= n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def _attend_page(
    q_ptr,
    keys_ptr,
    values_ptr,
    owner_ptr,
    fill_ptr,
    peak_ptr,
    total_ptr,
    sum_ptr,
    scale,
    heads,
    R: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    R_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Triton kernel for one page and its head's queries. Writes peak [P, R], total [P, R], sum [P, R, D]."""
    page = tl.program_id(0).to(tl.int64)  # 64 bits: a pool may have more than 2**31 elements
    owner = tl.load(owner_ptr + page)
    if (owner >= 0) & (owner < heads):
        fill = tl.minimum(tl.load(fill_ptr + page), S)
        r = tl.arange(0, R_PAD)
        d = tl.arange(0, D_PAD)
        in_q_RD = (r[:, None] < R) & (d[None, :] < D)
        offset_RD = r[:, None] * D + d[None, :]
        # Triton's interpreter multiplies the bits of bf16 as integers; in fp32 the products are the same.
        dot_type = tl.float32 if INTERPRETED else keys_ptr.dtype.element_ty
        q_RD = tl.load(q_ptr + owner * (R * D) + offset_RD, mask=in_q_RD, other=0.0).to(dot_type)
        peak_R = tl.full([R_PAD], float("-inf"), tl.float32)
        total_R = tl.zeros([R_PAD], tl.float32)
        sum_RD = tl.zeros([R_PAD, D_PAD], tl.float32)
        for start in range(0, fill, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            offset_SD = page * (S * D) + s[:, None] * D + d[None, :]
            valid_SD = (s[:, None] < fill) & (d[None, :] < D)
            # The loads are masked, not only the scores: 0 * NaN would be NaN.
            k_SD = tl.load(keys_ptr + offset_SD, mask=valid_SD, other=0.0)
            v_SD = tl.load(values_ptr + offset_SD, mask=valid_SD, other=0.0)
            # "ieee", because the default would cut fp32 to the 10 bits of TF32.
            score_RS = tl.dot(q_RD, tl.trans(k_SD.to(dot_type)), input_precision="ieee") * scale
            score_RS = tl.where(s[None, :] < fill, score_RS, float("-inf"))
            new_peak_R = tl.maximum(peak_R, tl.max(score_RS, axis=1))  # finite: as start < fill, one is valid
            shrink_R = tl.exp(peak_R - new_peak_R)
            weight_RS = tl.exp(score_RS - new_peak_R[:, None])
            total_R = total_R * shrink_R + tl.sum(weight_RS, axis=1)
            weight_RS = weight_RS.to(v_SD.dtype).to(dot_type)
            part_RD = tl.dot(weight_RS, v_SD.to(dot_type), input_precision="ieee")
            sum_RD = sum_RD * shrink_R[:, None] + part_RD
            peak_R = new_peak_R
        tl.store(peak_ptr + page * R + r, peak_R, mask=r < R)
        tl.store(total_ptr + page * R + r, total_R, mask=r < R)
        tl.store(sum_ptr + page * (R * D) + offset_RD, sum_RD, mask=in_q_RD)


def _combine_pages(
    peak_ptr,
    total_ptr,
    sum_ptr,
    order_ptr,
    first_ptr,
    out_ptr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Triton kernel for some channels of one query head, over its KV head's pages. Writes out [N, R, D]."""
    query = tl.program_id(0).to(tl.int64)  # head * R + r
    head = query // R
    begin = tl.load(first_ptr + head)
    end = tl.load(first_ptr + head + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        row_P = tl.load(order_ptr + i, mask=i < end, other=0) * R + query % R
        peak_P = tl.load(peak_ptr + row_P, mask=i < end, other=float("-inf"))
        total_P = tl.load(total_ptr + row_P, mask=i < end, other=0.0)
        mask_PD = (i[:, None] < end) & (d[None, :] < D)
        sum_PD = tl.load(sum_ptr + row_P[:, None] * D + d[None, :], mask=mask_PD, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peak_P, axis=0))
        # Pages without a valid pair have the peak -inf, and -inf - -inf would be NaN.
        finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp(peak - finite_peak)
        share_P = tl.exp(peak_P - finite_peak)
        total = total * shrink + tl.sum(total_P * share_P, axis=0)
        sum_D = sum_D * shrink + tl.sum(sum_PD * share_P[:, None], axis=0)
        peak = new_peak
    # A head without pairs would give 0 / 0. The test is == 0, not > 0: a valid pair's NaN must stay visible.
    out_D = sum_D / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + query * D + d, out_D.to(out_ptr.dtype.element_ty), mask=d < D)
