"""The one forward loop: a program owns a tile of queries and walks the keys. Variants are hooks and constexprs."""

import triton
import triton.language as tl

from .tiles import dot, keep_tile, load_tile, online_softmax_step, store_tile, visible_tile

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def ignore_logits(hook_args, logits, visible, q_idx, k_idx, batch_head):
    """The hook of plain attention: the compiler removes it."""


@triton.jit
def forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    hook_args,
    n_q,
    n_k,
    sm_scale,
    seed,
    drop_threshold,
    keep_scale,
    N_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    COMPUTE_OUTPUT: tl.constexpr,
    ON_LOGITS: tl.constexpr,
):
    """Attention of one query tile, with `ON_LOGITS(hook_args, logits, visible, q_idx, k_idx, batch_head)` at each tile.

    Grid: one dimension, query tiles of a head side by side, the longest causal row first.
    Source: FlashAttention-2 (Dao 2023), Algorithm 1.
    """
    m_blocks = tl.cdiv(n_q, BLOCK_M)
    batch_head = tl.program_id(0) // m_blocks
    q_start = (m_blocks - 1 - tl.program_id(0) % m_blocks) * BLOCK_M
    batch = batch_head // N_HEADS
    head = batch_head % N_HEADS
    q_idx = q_start + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q_desc, batch, head, q_start, BLOCK_M, BLOCK_D)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_stop = n_k
    if IS_CAUSAL:
        k_stop = tl.minimum(n_k, tl.maximum(q_start + BLOCK_M + n_k - n_q, 0))

    for k_start in range(0, k_stop, BLOCK_N):
        k_idx = k_start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_desc, batch, head // GROUP, k_start, BLOCK_N, BLOCK_D)
        logits = dot(q_tile, k_tile.T) * sm_scale  # S = s·Q·Kᵀ, [BLOCK_M, BLOCK_N]
        visible = visible_tile(q_idx, k_idx, n_q, n_k, IS_CAUSAL)
        ON_LOGITS(hook_args, logits, visible, q_idx, k_idx, batch_head)
        if COMPUTE_OUTPUT:
            logits_log2 = tl.where(visible, logits * LOG2_E, float("-inf"))
            row_max, row_sum, weights, rescale = online_softmax_step(row_max, row_sum, logits_log2)
            if HAS_DROPOUT:
                keep = keep_tile(seed, drop_threshold, batch_head, q_idx, k_idx)
                weights = tl.where(keep, weights * keep_scale, 0.0)
            v_tile = load_tile(v_desc, batch, head // GROUP, k_start, BLOCK_N, BLOCK_D)
            acc = dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None])

    if COMPUTE_OUTPUT:
        normaliser = tl.where(row_sum == 0.0, 1.0, row_sum)
        output = acc / normaliser[:, None]  # O = diag(l)⁻¹·O
        store_tile(out_desc, output, batch, head, q_start, BLOCK_M, BLOCK_D)
        lse = (row_max + tl.log2(normaliser)) * LN_2  # L = m + log(l), -inf for a row without keys
        tl.store(lse_ptr + batch_head.to(tl.int64) * n_q + q_idx, lse, mask=q_idx < n_q)
