"""Attention of one new token over pages: every head reads its own pairs, as many as it has, and no others.

Heads hold different numbers of pairs, so a batched product over heads would be as wide as the fullest head.
The pages of all heads have the same size. The products therefore run over pages, and a softmax that is joined
over the pages of each head puts the pieces together.

    attend = page_attention("torch")
    out_NRD = attend(q_NRD, keys_PSD, values_PSD, owner_P, fill_P, scale)

"torch" runs anywhere and is the default. "triton" is a kernel for CUDA (page_kernel_dms.py); choose it with

    model.page_attention = "triton"

Shapes: N heads (sequence times KV head), R query heads per KV head, P pages, S slots of a page, D head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .page_kernel_dms import attend_pages_triton

PageAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def attend_pages(
    q_NRD: Tensor, keys_PSD: Tensor, values_PSD: Tensor, owner_P: Tensor, fill_P: Tensor, scale: float
) -> Tensor:
    """softmax(q k^T * scale) v over all pairs of each head, in plain torch.

    Scores are products in the type of the inputs, as in transformers' eager attention; maxima, exponentials
    and sums are in fp32 for half types (fp64 stays fp64).

    Args:
        q_NRD: the query heads that share each KV head.
        keys_PSD, values_PSD: slots from `fill_P` on do not count, but must be finite. Keys and values may
            have different head sizes.
        owner_P: int64, the head that a page belongs to, N for a free page.
        fill_P: integers, the number of pairs in the page.
        scale: factor on the scores.

    Returns:
        [N, R, D] in the type of q, 0 for a head without pairs.
    """
    weight_PRS, sum_NR = weigh_pages(q_NRD, keys_PSD, owner_P, fill_P, scale)
    return join_pages(weight_PRS, sum_NR, values_PSD, owner_P).to(q_NRD.dtype)


def weigh_pages(
    q_NRD: Tensor, keys_PSD: Tensor, owner_P: Tensor, fill_P: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention weights before their division by the sum; the arguments are those of `attend_pages`.

    Returns:
        The weights [P, R, S], 0 where there is no pair, and their sums [N + 1, R] over the pairs of each
        head. The last row of the sums belongs to no head. Both are in fp32, or in fp64 for fp64 inputs.
    """
    N, R, _ = q_NRD.shape
    P, S, _ = keys_PSD.shape
    exact = torch.float64 if q_NRD.dtype == torch.float64 else torch.float32
    # Row N belongs to no head. The free pages own it, so that they need no case of their own.
    q_PRD = torch.cat([q_NRD * scale, q_NRD.new_zeros(1, *q_NRD.shape[1:])])[owner_P]
    score_PRS = torch.bmm(q_PRD, keys_PSD.transpose(1, 2)).to(exact)
    empty_PS = torch.arange(S, device=fill_P.device) >= fill_P[:, None]
    score_PRS = score_PRS.masked_fill(empty_PS[:, None], -torch.inf)

    # Maxima start at the lowest finite number: in a page without pairs, exp(-inf - (-inf)) would be NaN.
    lowest_NR = torch.full((N + 1, R), torch.finfo(exact).min, dtype=exact, device=q_NRD.device)
    top_NR = lowest_NR.scatter_reduce(0, owner_P[:, None].expand(P, R), score_PRS.amax(dim=2), "amax")
    weight_PRS = (score_PRS - top_NR[owner_P][..., None]).exp()
    return weight_PRS, torch.zeros_like(top_NR).index_add_(0, owner_P, weight_PRS.sum(dim=2))


def join_pages(weight_PRS: Tensor, sum_NR: Tensor, values_PSD: Tensor, owner_P: Tensor) -> Tensor:
    """[N, R, D]: the values averaged with the weights and sums of `weigh_pages`, in the type of the sums."""
    part_PRD = torch.bmm(weight_PRS.to(values_PSD.dtype), values_PSD).to(sum_NR.dtype)
    out_NRD = part_PRD.new_zeros(*sum_NR.shape, values_PSD.shape[-1]).index_add_(0, owner_P, part_PRD)
    # The sum is at least 1 in a head with a pair, as the highest score has weight 1.
    return out_NRD[:-1] / sum_NR[:-1, :, None].clamp(min=0.5)


PAGE_ATTENTION: dict[str, PageAttention] = {"torch": attend_pages, "triton": attend_pages_triton}


def page_attention(name: str) -> PageAttention:
    """The implementation of that name.

    Raises:
        ValueError: there is no implementation of that name; no other one is taken in its place.
    """
    if name not in PAGE_ATTENTION:
        raise ValueError(f"page attention is {name!r}, expected one of {sorted(PAGE_ATTENTION)}")
    return PAGE_ATTENTION[name]
