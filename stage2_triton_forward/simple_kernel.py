"""The teaching kernel: stage 1's loop, one program per query tile, with nothing clever in it."""

import triton
import triton.language as tl

from .tiles import dot


@triton.jit
def simple_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    n_q,
    n_k,
    sm_scale,
    N_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Attention of one query tile of one head against all its keys.

    Grid: (query tiles, batch·heads). Source: FlashAttention-2 (Dao 2023), Algorithm 1.
    """
    m_block = tl.program_id(0)
    batch = (tl.program_id(1) // N_HEADS).to(tl.int64)
    head = tl.program_id(1) % N_HEADS
    kv_head = head // GROUP

    q_idx = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    d_idx = tl.arange(0, BLOCK_D)
    in_head_dim = d_idx < HEAD_DIM
    in_rows = (q_idx[:, None] < n_q) & in_head_dim

    q_head = q_ptr + batch * q_strides[0] + head * q_strides[1]
    k_head = k_ptr + batch * k_strides[0] + kv_head * k_strides[1]
    v_head = v_ptr + batch * v_strides[0] + kv_head * v_strides[1]

    q_tile = tl.load(q_head + q_idx[:, None] * q_strides[2] + d_idx * q_strides[3], mask=in_rows, other=0.0)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for k_start in range(0, n_k, BLOCK_N):
        k_idx = k_start + tl.arange(0, BLOCK_N)
        in_keys = (k_idx[:, None] < n_k) & in_head_dim
        k_tile = tl.load(
            k_head + k_idx[:, None] * k_strides[2] + d_idx[None, :] * k_strides[3], mask=in_keys, other=0.0
        )
        v_tile = tl.load(
            v_head + k_idx[:, None] * v_strides[2] + d_idx[None, :] * v_strides[3], mask=in_keys, other=0.0
        )

        logits = dot(q_tile, k_tile.T) * sm_scale  # S = s·Q·Kᵀ, [BLOCK_M, BLOCK_N]
        visible = k_idx[None, :] < n_k
        if IS_CAUSAL:
            visible = visible & (k_idx[None, :] <= q_idx[:, None] + n_k - n_q)
        logits = tl.where(visible, logits, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(logits, 1))  # m_j = max(m_{j-1}, rowmax(S_j))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row with no key so far: -inf - (-inf) is NaN
        weights = tl.exp(logits - shift[:, None])  # P_j = e^{S_j - m_j}
        rescale = tl.exp(row_max - shift)  # e^{m_{j-1} - m_j}
        row_sum = row_sum * rescale + tl.sum(weights, 1)  # l_j = l_{j-1}·e^{m_{j-1}-m_j} + rowsum(P_j)
        acc = dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None])  # O_j = O_{j-1}·e^{m_{j-1}-m_j} + P_j·V_j
        row_max = new_max

    normaliser = tl.where(row_sum == 0.0, 1.0, row_sum)
    output = acc / normaliser[:, None]  # O = diag(l)⁻¹·O
    lse = row_max + tl.log(normaliser)  # L = m + log(l), -inf for a row without keys

    out_head = out_ptr + batch * out_strides[0] + head * out_strides[1]
    out_offsets = q_idx[:, None] * out_strides[2] + d_idx * out_strides[3]
    tl.store(out_head + out_offsets, output.to(out_ptr.dtype.element_ty), mask=in_rows)
    tl.store(lse_ptr + (batch * N_HEADS + head) * n_q + q_idx, lse, mask=q_idx < n_q)
