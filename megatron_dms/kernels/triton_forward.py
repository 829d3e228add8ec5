"""Triton kernel for the forward of DMS attention: outputs and log-sum-exps of one block of queries.

Window and rest are two loops of one online softmax. The first loop reads the window from the keys in place,
without bias. The second loop reads only the survivors beyond the window: the keys of a KV head whose bias is
not negligible, packed in ascending order (survivors.py), so that evicted keys cost nothing. Scores are in
base 2, in which the hardware exponentiates.

Shapes: M queries and N keys of a block, T tokens, D head size, DP the power of two that holds it.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-1e30)
"""Stands for -inf in a row that has seen no key yet, because -inf - -inf would be NaN."""


@triton.jit
def load_rows(base, row, stride, size, D: tl.constexpr, DP: tl.constexpr, TO: tl.constexpr):
    """Load [rows, DP] of a matrix with contiguous channels; 0 where a row or channel does not exist."""
    d = tl.arange(0, DP)
    inside = row[:, None] < size
    if D < DP:
        inside = inside & (d[None, :] < D)
    return tl.load(base + row[:, None] * stride + d[None, :], mask=inside, other=0.0).to(TO)


@triton.jit
def absorb(score_MN, v_ND, out_MD, total_M, peak_M, VALUE: tl.constexpr):
    """Add one block of scores and values to an online softmax."""
    new_M = tl.maximum(peak_M, tl.max(score_MN, 1))
    shrink_M = tl.exp2(peak_M - new_M)
    weight_MN = tl.exp2(score_MN - new_M[:, None])
    total_M = total_M * shrink_M + tl.sum(weight_MN, 1)
    # Rounded to the type of the values, also where the interpreter multiplies in fp32.
    weight_MN = weight_MN.to(VALUE).to(v_ND.dtype)
    out_MD = out_MD * shrink_M[:, None] + tl.dot(weight_MN, v_ND, input_precision="ieee")
    return out_MD, total_M, new_M


@triton.jit
def recent_block(
    q_MD, m_M, k_base, v_base, start_n, n_N, stride_kt, stride_vt, T, window, scale,
    D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Keys, values and scores of a block of keys in place; -inf where a key is not in a query's window."""
    far = tl.cast(start_n, tl.int64)
    k_ND = load_rows(k_base + far * stride_kt, n_N, stride_kt, T - start_n, D, DP, DOT)
    v_ND = load_rows(v_base + far * stride_vt, n_N, stride_vt, T - start_n, D, DP, DOT)
    age_MN = m_M[:, None] - (start_n + n_N)[None, :]
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
    return k_ND, v_ND, tl.where((age_MN >= 0) & (age_MN <= window), score_MN, float("-inf"))


@triton.jit
def kept_block(
    q_MD, kept_k, kept_v, kept_bias, start_n, n_N, end, scale,
    D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Keys, values and scores of a block of survivors; the survivors before `end` exist."""
    far = tl.cast(start_n, tl.int64)
    k_ND = load_rows(kept_k + far * D, n_N, D, end - start_n, D, DP, DOT)
    v_ND = load_rows(kept_v + far * D, n_N, D, end - start_n, D, DP, DOT)
    bias_N = tl.load(kept_bias + start_n + n_N, mask=start_n + n_N < end, other=0.0)
    return k_ND, v_ND, tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale + bias_N[None, :]


@triton.jit
def hide_recent(score_MN, m_M, positions, start_n, n_N, end, window):
    """Keep the scores of survivors that exist and are older than a query's window; -inf elsewhere."""
    exists_N = start_n + n_N < end
    position_N = tl.load(positions + start_n + n_N, mask=exists_N, other=0)
    readable_MN = exists_N[None, :] & (m_M[:, None] - position_N[None, :] > window)
    return tl.where(readable_MN, score_MN, float("-inf"))


@triton.jit
def attend_queries(
    q_ptr, k_ptr, v_ptr, kept_k_ptr, kept_v_ptr, position_ptr, bias_ptr, before_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    stride_ob, stride_oh, stride_ot, T, window, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attention of one block of queries of one query head.

    Args:
        q_ptr, k_ptr, v_ptr, out_ptr: tensors that are addressed by their strides.
        kept_k_ptr, kept_v_ptr: [B, G, T, D], keys and values of the survivors; the rest is uninitialised.
        position_ptr: [B, G, T] int32, the survivors' positions.
        bias_ptr: [B, G, T] fp32, the survivors' biases times log2(e).
        before_ptr: [B, G, T + 1] int32, the number of survivors among the first t tokens.
        lse_ptr: [B, H, T] fp32, log2 of the sum of exp2(score).
        scale: factor on q . k, times log2(e).
        DOT: type of the factors of products: the type of q, or fp32 in the interpreter.
    """
    # The last queries have the most keys to read, so they start first.
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    g = h // (H // G)
    row_M = tl.arange(0, M)
    m_M = start_m + row_M
    q_base = q_ptr + b * stride_qb + h * stride_qh + start_m.to(tl.int64) * stride_qt
    q_MD = load_rows(q_base, row_M, stride_qt, T - start_m, D, DP, DOT)
    out_MD = tl.zeros([M, DP], tl.float32)
    total_M = tl.zeros([M], tl.float32)
    peak_M = tl.full([M], LOWEST, tl.float32)
    n_N = tl.arange(0, N)
    end_m = tl.minimum(start_m + M, T)

    k_base = k_ptr + b * stride_kb + g * stride_kg
    v_base = v_ptr + b * stride_vb + g * stride_vg
    for start_n in range(tl.maximum(start_m - window, 0) // N * N, end_m, N):
        k_ND, v_ND, score_MN = recent_block(
            q_MD, m_M, k_base, v_base, start_n, n_N, stride_kt, stride_vt, T, window, scale, D, DP, DOT
        )
        out_MD, total_M, peak_M = absorb(score_MN, v_ND, out_MD, total_M, peak_M, v_ptr.dtype.element_ty)

    # Survivors older than every query's window need no mask; the last few are older than some windows only.
    head = (b * G + g) * T
    before = before_ptr + (b * G + g) * (T + 1)
    for_all = tl.load(before + tl.maximum(start_m - window, 0)) // N * N
    for_some = tl.load(before + tl.maximum(end_m - 1 - window, 0))
    kept_k = kept_k_ptr + head * D
    kept_v = kept_v_ptr + head * D
    kept_bias = bias_ptr + head
    for start_n in range(0, for_all, N):
        k_ND, v_ND, score_MN = kept_block(
            q_MD, kept_k, kept_v, kept_bias, start_n, n_N, for_all, scale, D, DP, DOT
        )
        out_MD, total_M, peak_M = absorb(score_MN, v_ND, out_MD, total_M, peak_M, v_ptr.dtype.element_ty)
    for start_n in range(for_all, for_some, N):
        k_ND, v_ND, score_MN = kept_block(
            q_MD, kept_k, kept_v, kept_bias, start_n, n_N, for_some, scale, D, DP, DOT
        )
        score_MN = hide_recent(score_MN, m_M, position_ptr + head, start_n, n_N, for_some, window)
        out_MD, total_M, peak_M = absorb(score_MN, v_ND, out_MD, total_M, peak_M, v_ptr.dtype.element_ty)

    exists_M = m_M < T
    d = tl.arange(0, DP)
    out_base = out_ptr + b * stride_ob + h * stride_oh + start_m.to(tl.int64) * stride_ot
    out_MD = out_MD / tl.where(exists_M, total_M, 1.0)[:, None]
    tl.store(
        out_base + row_M[:, None] * stride_ot + d[None, :],
        out_MD.to(out_ptr.dtype.element_ty),
        mask=exists_M[:, None] & (d[None, :] < D),
    )
    tl.store(lse_ptr + (b * H + h) * T + m_M, peak_M + tl.log2(total_M), mask=exists_M)


@triton.jit
def pack_survivors(
    k_ptr, v_ptr, log_keep_ptr, order_ptr, before_ptr, kept_k_ptr, kept_v_ptr, bias_ptr,
    stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt, T, log2_e,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Copy the survivors' keys, values and biases side by side, as `attend_queries` reads them."""
    b = (tl.program_id(1) // G).to(tl.int64)
    g = (tl.program_id(1) % G).to(tl.int64)
    kept = tl.load(before_ptr + (b * G + g) * (T + 1) + T)
    start = tl.program_id(0) * N
    if start < kept:
        head = (b * G + g) * T
        n_N = start + tl.arange(0, N)
        position_N = tl.load(order_ptr + head + n_N, mask=n_N < kept, other=T)
        bias_N = tl.load(log_keep_ptr + head + position_N, mask=n_N < kept, other=0.0)
        tl.store(bias_ptr + head + n_N, bias_N * log2_e, mask=n_N < kept)
        row_N = position_N.to(tl.int64)
        d = tl.arange(0, DP)
        to = (head + n_N.to(tl.int64))[:, None] * D + d[None, :]
        inside = (n_N < kept)[:, None] & (d[None, :] < D)
        k_ND = load_rows(
            k_ptr + b * stride_kb + g * stride_kg, row_N, stride_kt, T, D, DP, k_ptr.dtype.element_ty
        )
        v_ND = load_rows(
            v_ptr + b * stride_vb + g * stride_vg, row_N, stride_vt, T, D, DP, v_ptr.dtype.element_ty
        )
        tl.store(kept_k_ptr + to, k_ND, mask=inside)
        tl.store(kept_v_ptr + to, v_ND, mask=inside)
