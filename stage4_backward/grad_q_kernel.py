"""Gradient of the queries: query-stationary, like the forward pass, with the weights computed again from the lse."""

import triton
import triton.language as tl

from stage2_triton_forward.tiles import dot, load_tile, store_tile, visible_keys, visible_tile
from stage3_scores_and_sums.hooks import final_weights, load_lse

from .grad_tiles import dropped, grad_logits


@triton.jit
def grad_q_kernel(
    q_desc,  # [B, Hq, M, D]
    k_desc,  # [B, Hk, N, D]
    v_desc,  # [B, Hk, N, Dv]
    grad_out_desc,  # [B, Hq, M, Dv]
    grad_q_desc,  # [B, Hq, M, D]
    lse_ptr,  # [B, Hq, M]
    delta_ptr,  # [B, Hq, M]
    mask,
    to_logits,
    dropout,
    tiles,
    score_grads,
    N_HEADS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """Compute dQ = s·dS·K of one query tile.

    Grid: (batch·Hq, query tiles), the longest causal rows first. Source: FlashAttention-2, eq. 18.
    """
    BLOCK_M: tl.constexpr = tiles.BLOCK_M
    batch_head = tl.program_id(0)
    batch = batch_head // N_HEADS
    head = batch_head % N_HEADS
    q_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_idx = q_start + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q_desc, batch, head, q_start, BLOCK_M, tiles.BLOCK_D)
    grad_out = load_tile(grad_out_desc, batch, head, q_start, BLOCK_M, tiles.BLOCK_DV)
    row = batch_head.to(tl.int64) * mask.n_q
    lse_log2 = load_lse(lse_ptr + row, q_idx, mask.n_q)
    delta = tl.load(delta_ptr + row + q_idx, mask=q_idx < mask.n_q, other=0.0)
    begin, whole_begin, whole_stop, stop = visible_keys(mask, q_start, BLOCK_M, tiles.BLOCK_N)
    acc = tl.zeros([BLOCK_M, tiles.BLOCK_D], tl.float32)
    if mask.HAS_LEFT:
        acc = walk_keys(
            acc, begin, tl.minimum(whole_begin, stop), True, q_tile, k_desc, v_desc, grad_out, lse_log2, delta,
            mask, to_logits, dropout, tiles, score_grads, batch, head, batch_head, q_idx,
        )  # fmt: skip
    acc = walk_keys(
        acc, whole_begin, whole_stop, False, q_tile, k_desc, v_desc, grad_out, lse_log2, delta,
        mask, to_logits, dropout, tiles, score_grads, batch, head, batch_head, q_idx,
    )  # fmt: skip
    if HAS_TAIL:
        acc = walk_keys(
            acc, whole_stop, stop, True, q_tile, k_desc, v_desc, grad_out, lse_log2, delta,
            mask, to_logits, dropout, tiles, score_grads, batch, head, batch_head, q_idx,
        )  # fmt: skip
    store_tile(grad_q_desc, acc * to_logits.scale, batch, head, q_start, BLOCK_M, tiles.BLOCK_D)  # dQ = s·dS·K


@triton.jit
def walk_keys(
    acc, begin, stop, MASKED: tl.constexpr, q_tile, k_desc, v_desc, grad_out, lse_log2, delta,
    mask, to_logits, dropout, tiles, score_grads, batch, head, batch_head, q_idx,
):  # fmt: skip
    """Add what the keys from `begin` to `stop` give to the gradient of a query tile."""
    BLOCK_N: tl.constexpr = tiles.BLOCK_N
    kv_head = head // tiles.GROUP
    for k_start in tl.range(begin, stop, BLOCK_N, disable_licm=MASKED):
        k_start = tl.multiple_of(k_start, BLOCK_N)
        k_idx = k_start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_desc, batch, kv_head, k_start, BLOCK_N, tiles.BLOCK_D)
        v_tile = load_tile(v_desc, batch, kv_head, k_start, BLOCK_N, tiles.BLOCK_DV)
        logits = dot(q_tile, k_tile.T, None, to_logits.FP32_PRECISION)  # S = Q·Kᵀ
        grad_weights = dot(grad_out, v_tile.T, None, to_logits.FP32_PRECISION)  # dP = dO·Vᵀ
        weights = final_weights(to_logits, logits, to_logits.scale, lse_log2[:, None])  # P = e^{S - L}
        visible = (q_idx < mask.n_q)[:, None]
        if MASKED or mask.HAS_PADDING:
            visible = visible_tile(mask, batch, q_idx, k_idx)
            weights = tl.where(visible, weights, 0.0)
        if dropout.ENABLED:
            grad_weights *= dropped(dropout, batch_head, q_idx, k_idx)
        grad = grad_logits(
            to_logits, score_grads, mask, logits, weights, grad_weights, delta[:, None], visible,
            batch_head, q_idx[:, None], k_idx[None, :],
        )  # fmt: skip
        acc = dot(grad.to(k_tile.dtype), k_tile, acc, to_logits.FP32_PRECISION)
    return acc
