"""The dense reference: DMS attention with the whole T x T score matrix.

Every faster back-end has this signature and is tested against this function, gradients included.
Shapes: B samples, H query heads, G KV heads (H a multiple of G), T tokens, D head size.
"""

import torch
from torch import Tensor


def dms_attention(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, window: int, scale: float | None = None
) -> Tensor:
    """Causal attention in which a pair beyond the window is weighted by 1 - alpha (paper, section 3).

    Query i sees key j <= i with score bias 0 if i - j <= window (window + 1 pairs, the token itself
    included), and with bias log_keep[j] otherwise. All query heads of a group share their KV head's bias.

    Args:
        q: [B, H, T, D].
        k, v: [B, G, T, D].
        log_keep: [B, G, T] = log(1 - alpha), already shifted by the lag; -inf where a pair is evicted for
            good.
        window: >= 0, in tokens.
        scale: factor on q . k; default D ** -0.5.

    Returns:
        [B, H, T, D] in q's dtype; scores and softmax are computed in fp32 at least.
    """
    B, H, T, D = q.shape
    G = k.shape[1]
    if k.shape != (B, G, T, D) or v.shape[:3] != (B, G, T) or log_keep.shape != (B, G, T) or H % G:
        raise ValueError(
            f"expected q [B,H,T,D], k and v [B,G,T,D], log_keep [B,G,T] with H a multiple of G, found "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, log_keep {tuple(log_keep.shape)}"
        )
    if window < 0:
        raise ValueError(f"window is {window}, expected >= 0")
    work = torch.promote_types(q.dtype, torch.float32)
    scale = D**-0.5 if scale is None else scale
    grouped_q = q.to(work).view(B, G, H // G, T, D)
    scores = torch.einsum("bghid,bgjd->bghij", grouped_q * scale, k.to(work))  # [B, G, H/G, T, T]

    position = torch.arange(T, device=q.device)
    age = position[:, None] - position[None, :]  # i - j, [T, T]
    bias = torch.where(age > window, log_keep.to(work)[:, :, None, :], 0.0).masked_fill(
        age < 0, float("-inf")
    )
    scores = scores + bias[:, :, None]  # bias: [B, G, T, T]
    out = torch.einsum("bghij,bgjd->bghid", scores.softmax(dim=-1), v.to(work))
    return out.reshape(B, H, T, v.shape[-1]).to(q.dtype)
