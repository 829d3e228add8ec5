"""Merging instead of eviction: Dynamic Memory Compression (DMC, Nawrot et al., ICML 2024, arXiv 2403.09636).

DMC is here for comparison with DMS, its successor. alpha = 1 merges a token's pair into the slot before it,
and alpha = 0 opens a new slot. A slot holds the mean of its pairs, weighted by their importance omega:

    z_t  = alpha_t z_{t-1} + omega_t                                  (the slot's weight)
    k'_t = (alpha_t z_{t-1} k'_{t-1} + omega_t k_t) / z_t             (values alike)

In training, alpha is soft and each k'_j is a slot of its own. Query i sees k'_j, j < i, with score bias
log(1 - alpha_{j+1}), because token j + 1 has taken its place to the degree alpha_{j+1}. It sees k'_i without
bias. That is DMS attention over k' and v' with a window of 0 and a lag of 1. With hard decisions only the
last accumulation of each run is visible, which is what a merged cache holds.

This differs from the paper in four points. Decision and importance are read from the last channel of key and
query, not the first, after the q- and k-norm. Noise, temperature, offset, compression loss, schedule and
distillation are those of DMS, so that only merging is compared. In training, a whole run is accumulated,
however long it is. The means of keys and values are taken after RoPE.

Shapes: B samples, G KV heads, T tokens, D head size.
"""

import torch
from torch import Tensor

SMALLEST_ALPHA = 1e-30
"""An alpha below this value opens a new slot and has no gradient. The derivative of the relaxed decision
would make its gradient just as small, and the derivative of the logarithm stays finite in fp32."""


def merge_pairs(k: Tensor, v: Tensor, alpha: Tensor, log_importance: Tensor) -> tuple[Tensor, Tensor]:
    """The accumulations k'_t and v'_t of every token, all at once.

    Unrolled, k'_t is the mean of the keys so far with weights omega_j * prod_{s=j+1..t} alpha_s. The weights
    are a softmax over j of log omega_j - sum_{s<=j} log alpha_s: one T x T matrix per KV head, no loop over
    tokens. The sums are in fp64, because they grow with T while their differences matter.

    Args:
        k, v: [B, G, T, D], keys after RoPE; their head sizes may differ.
        alpha: [B, G, T] in [0, 1]; the first token opens a slot whatever its alpha is.
        log_importance: [B, G, T], log omega, finite.

    Returns:
        k' and v', with the shapes and types of k and v, computed in fp32 at least.
    """
    shape = k.shape[:3]
    if v.shape[:3] != shape or alpha.shape != shape or log_importance.shape != shape:
        raise ValueError(
            f"expected k and v [B,G,T,D], alpha and log_importance [B,G,T], found k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}, alpha {tuple(alpha.shape)}, log_importance {tuple(log_importance.shape)}"
        )
    T, work = shape[2], torch.promote_types(k.dtype, torch.float32)
    position = torch.arange(T, device=k.device)
    opens = (alpha < SMALLEST_ALPHA) | (position == 0)  # [B, G, T]
    run = opens.cumsum(dim=-1)  # the run of merged tokens that each token belongs to
    log_kept = torch.log(alpha.double().masked_fill(opens, 1.0)).cumsum(dim=-1)
    score = log_importance.double() - log_kept  # the score of token j in every k'_t of its run
    together = (run[..., :, None] == run[..., None, :]) & (position[:, None] >= position)  # [B, G, t, j]
    # An offset of a whole row does not change its softmax, but costs precision: the highest score becomes 0.
    scores = score[..., None, :].masked_fill(~together, float("-inf"))
    weights = (scores - scores.detach().amax(dim=-1, keepdim=True)).to(work).softmax(dim=-1)
    merged = weights @ torch.cat([k, v], dim=-1).to(work)
    return merged[..., : k.shape[-1]].to(k.dtype), merged[..., k.shape[-1] :].to(v.dtype)
