"""Triton kernels for the backward of DMS attention: one for queries, one for keys, values and biases.

Both kernels recompute the scores, and get the weights from the log-sum-exp of the forward. One program sums
each gradient in a fixed order, so that a result is the same in every bit each time.

The second kernel distributes a KV head's keys in the order of survivors.py: first blocks of survivors, which
all queries up to the end of the text may read, then blocks of the other keys, which no query reads beyond
their window. Each key thus belongs to one program, which takes the query heads of the group one by one.

Shapes: M queries and N keys of a block, T tokens, D head size, DP the power of two that holds it.
"""

import triton
import triton.language as tl

from megatron_dms.kernels.triton_forward import hide_recent, kept_block, load_rows, recent_block


@triton.jit
def query_sums(
    out_ptr, grad_ptr, delta_ptr, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, T,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Write delta [B, H, T] fp32: output times its gradient, summed over channels."""
    m_M = tl.program_id(0) * M + tl.arange(0, M)
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    row_M = m_M.to(tl.int64)
    out_base = out_ptr + b * stride_ob + h * stride_oh
    grad_base = grad_ptr + b * stride_gb + h * stride_gh
    out_MD = load_rows(out_base, row_M, stride_ot, T, D, DP, tl.float32)
    grad_MD = load_rows(grad_base, row_M, stride_gt, T, D, DP, tl.float32)
    tl.store(delta_ptr + (b * H + h) * T + m_M, tl.sum(out_MD * grad_MD, 1), mask=m_M < T)


@triton.jit
def add_to_query(score_MN, lse_M, delta_M, grad_MD, k_ND, v_ND, dq_MD, TYPE: tl.constexpr):
    """dq without its scale, from one block of keys."""
    weight_MN = tl.exp2(score_MN - lse_M[:, None])
    dweight_MN = tl.dot(grad_MD, tl.trans(v_ND), input_precision="ieee")
    dscore_MN = weight_MN * (dweight_MN - delta_M[:, None])
    return dq_MD + tl.dot(dscore_MN.to(TYPE).to(k_ND.dtype), k_ND, input_precision="ieee")


@triton.jit
def query_gradients(
    q_ptr, k_ptr, v_ptr, kept_k_ptr, kept_v_ptr, position_ptr, bias_ptr, before_ptr, lse_ptr,
    grad_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    T, window, scale, natural_scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head; the loops are those of the forward.

    Args:
        grad_ptr, dq_ptr: gradients of the output and of the queries, addressed by their strides.
        delta_ptr: the result of `query_sums`.
        natural_scale: factor on q . k; the other arguments are those of attend_queries.
    """
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    g = h // (H // G)
    row_M = tl.arange(0, M)
    m_M = start_m + row_M
    exists_M = m_M < T
    far_m = start_m.to(tl.int64)
    q_MD = load_rows(
        q_ptr + b * stride_qb + h * stride_qh + far_m * stride_qt, row_M, stride_qt, T - start_m, D, DP, DOT
    )
    grad_MD = load_rows(
        grad_ptr + b * stride_gb + h * stride_gh + far_m * stride_gt,
        row_M,
        stride_gt,
        T - start_m,
        D,
        DP,
        DOT,
    )
    lse_M = tl.load(lse_ptr + (b * H + h) * T + m_M, mask=exists_M, other=0.0)
    delta_M = tl.load(delta_ptr + (b * H + h) * T + m_M, mask=exists_M, other=0.0)
    dq_MD = tl.zeros([M, DP], tl.float32)
    n_N = tl.arange(0, N)
    end_m = tl.minimum(start_m + M, T)

    k_base = k_ptr + b * stride_kb + g * stride_kg
    v_base = v_ptr + b * stride_vb + g * stride_vg
    for start_n in range(tl.maximum(start_m - window, 0) // N * N, end_m, N):
        k_ND, v_ND, score_MN = recent_block(
            q_MD, m_M, k_base, v_base, start_n, n_N, stride_kt, stride_vt, T, window, scale, D, DP, DOT
        )
        dq_MD = add_to_query(score_MN, lse_M, delta_M, grad_MD, k_ND, v_ND, dq_MD, q_ptr.dtype.element_ty)

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
        dq_MD = add_to_query(score_MN, lse_M, delta_M, grad_MD, k_ND, v_ND, dq_MD, q_ptr.dtype.element_ty)
    for start_n in range(for_all, for_some, N):
        k_ND, v_ND, score_MN = kept_block(
            q_MD, kept_k, kept_v, kept_bias, start_n, n_N, for_some, scale, D, DP, DOT
        )
        score_MN = hide_recent(score_MN, m_M, position_ptr + head, start_n, n_N, for_some, window)
        dq_MD = add_to_query(score_MN, lse_M, delta_M, grad_MD, k_ND, v_ND, dq_MD, q_ptr.dtype.element_ty)

    d = tl.arange(0, DP)
    dq_base = dq_ptr + b * stride_dqb + h * stride_dqh + far_m * stride_dqt
    tl.store(
        dq_base + row_M[:, None] * stride_dqt + d[None, :],
        (dq_MD * natural_scale).to(dq_ptr.dtype.element_ty),
        mask=exists_M[:, None] & (d[None, :] < D),
    )


@triton.jit
def add_to_keys(score_NM, lse_M, delta_M, q_MD, grad_MD, v_ND, dk_ND, dv_ND, TYPE: tl.constexpr):
    """dk without its scale, dv, and d(score), from one block of queries."""
    weight_NM = tl.exp2(score_NM - lse_M[None, :])
    dv_ND += tl.dot(weight_NM.to(TYPE).to(grad_MD.dtype), grad_MD, input_precision="ieee")
    dweight_NM = tl.dot(v_ND, tl.trans(grad_MD), input_precision="ieee")
    dscore_NM = weight_NM * (dweight_NM - delta_M[None, :])
    dk_ND += tl.dot(dscore_NM.to(TYPE).to(q_MD.dtype), q_MD, input_precision="ieee")
    return dk_ND, dv_ND, dscore_NM


@triton.jit
def key_gradients(
    q_ptr, k_ptr, v_ptr, order_ptr, log_keep_ptr, before_ptr, lse_ptr, grad_ptr, delta_ptr,
    dk_ptr, dv_ptr, dlog_keep_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkg, stride_dkt, stride_dvb, stride_dvg, stride_dvt,
    T, window, scale, natural_scale, log2_e,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk, dv and d(log_keep) of one block of keys of one KV head.

    Args:
        order_ptr: [B, G, T] int32, positions: the survivors in ascending order, then the other keys.
        log_keep_ptr, dlog_keep_ptr: [B, G, T] fp32, in the order of positions.
        dk_ptr, dv_ptr: gradients of keys and values, addressed by their strides.
    """
    b = (tl.program_id(1) // G).to(tl.int64)
    g = (tl.program_id(1) % G).to(tl.int64)
    kept = tl.load(before_ptr + (b * G + g) * (T + 1) + T)
    blocks_kept = tl.cdiv(kept, N)
    block = tl.program_id(0)
    survives = block < blocks_kept  # the longest programs start first
    start = tl.where(survives, block * N, kept + (block - blocks_kept) * N)
    end = tl.where(survives, kept, T)
    if start < end:
        head = (b * G + g) * T
        n_N = start + tl.arange(0, N)
        exists_N = n_N < end
        position_N = tl.load(order_ptr + head + n_N, mask=exists_N, other=T)
        bias_N = tl.load(log_keep_ptr + head + position_N, mask=exists_N, other=0.0) * log2_e
        bias_N = tl.where(survives & exists_N, bias_N, float("-inf"))
        first = tl.load(order_ptr + head + start)
        last = tl.load(order_ptr + head + tl.minimum(start + N, end) - 1)
        row_N = position_N.to(tl.int64)
        k_ND = load_rows(k_ptr + b * stride_kb + g * stride_kg, row_N, stride_kt, T, D, DP, DOT)
        v_ND = load_rows(v_ptr + b * stride_vb + g * stride_vg, row_N, stride_vt, T, D, DP, DOT)
        dk_ND = tl.zeros([N, DP], tl.float32)
        dv_ND = tl.zeros([N, DP], tl.float32)
        dbias_N = tl.zeros([N], tl.float32)
        row_M = tl.arange(0, M)
        # From `mixed` on, every query is beyond the window of every key of the block.
        begin = first // M * M
        mixed = tl.minimum(tl.cdiv(last + window + 1, M) * M, tl.cdiv(T, M) * M)
        stop = tl.where(survives, T, tl.minimum(last + window + 1, T))
        for r in range(H // G):
            h = g * (H // G) + r
            q_base = q_ptr + b * stride_qb + h * stride_qh
            grad_base = grad_ptr + b * stride_gb + h * stride_gh
            sums = (b * H + h) * T
            # Queries beyond the last token are 0, and so are their gradients: they add nothing.
            for start_m in range(begin, tl.minimum(mixed, stop), M):
                far = tl.cast(start_m, tl.int64)
                m_M = start_m + row_M
                q_MD = load_rows(q_base + far * stride_qt, row_M, stride_qt, T - start_m, D, DP, DOT)
                grad_MD = load_rows(grad_base + far * stride_gt, row_M, stride_gt, T - start_m, D, DP, DOT)
                lse_M = tl.load(lse_ptr + sums + m_M, mask=m_M < T, other=0.0)
                delta_M = tl.load(delta_ptr + sums + m_M, mask=m_M < T, other=0.0)
                age_NM = m_M[None, :] - position_N[:, None]
                score_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * scale
                score_NM += tl.where(age_NM > window, bias_N[:, None], 0.0)
                score_NM = tl.where(age_NM >= 0, score_NM, float("-inf"))
                dk_ND, dv_ND, dscore_NM = add_to_keys(
                    score_NM, lse_M, delta_M, q_MD, grad_MD, v_ND, dk_ND, dv_ND, q_ptr.dtype.element_ty
                )
                dbias_N += tl.sum(tl.where(age_NM > window, dscore_NM, 0.0), 1)
            for start_m in range(mixed, stop, M):
                far = tl.cast(start_m, tl.int64)
                m_M = start_m + row_M
                q_MD = load_rows(q_base + far * stride_qt, row_M, stride_qt, T - start_m, D, DP, DOT)
                grad_MD = load_rows(grad_base + far * stride_gt, row_M, stride_gt, T - start_m, D, DP, DOT)
                lse_M = tl.load(lse_ptr + sums + m_M, mask=m_M < T, other=0.0)
                delta_M = tl.load(delta_ptr + sums + m_M, mask=m_M < T, other=0.0)
                score_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * scale + bias_N[:, None]
                dk_ND, dv_ND, dscore_NM = add_to_keys(
                    score_NM, lse_M, delta_M, q_MD, grad_MD, v_ND, dk_ND, dv_ND, q_ptr.dtype.element_ty
                )
                dbias_N += tl.sum(dscore_NM, 1)
        d = tl.arange(0, DP)
        inside = exists_N[:, None] & (d[None, :] < D)
        dk_base = dk_ptr + b * stride_dkb + g * stride_dkg
        dv_base = dv_ptr + b * stride_dvb + g * stride_dvg
        dk_ND = (dk_ND * natural_scale).to(dk_ptr.dtype.element_ty)
        tl.store(dk_base + row_N[:, None] * stride_dkt + d[None, :], dk_ND, mask=inside)
        tl.store(
            dv_base + row_N[:, None] * stride_dvt + d[None, :], dv_ND.to(dv_ptr.dtype.element_ty), mask=inside
        )
        tl.store(dlog_keep_ptr + head + position_N, dbias_N, mask=exists_N)
