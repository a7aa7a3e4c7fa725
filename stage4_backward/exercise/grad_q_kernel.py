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
    tl.static_assert(False, "Task 4.11: step 1: what stays while the keys pass by, and which keys those are")
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
    tl.static_assert(False, "Task 4.11: step 2: the factor that dQ still lacks, and store")


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
        tl.static_assert(False, "Task 4.12: step 1: tiles of k and v, logits, dP, and the weights again")
        visible = (q_idx < mask.n_q)[:, None]
        if MASKED or mask.HAS_PADDING:
            tl.static_assert(False, "Task 4.12: step 2: who sees whom; weights of 0 where nobody does")
        if dropout.ENABLED:
            tl.static_assert(False, "Task 4.12: step 3: the forward pass's dropout, on dP")
        grad = grad_logits(
            to_logits, score_grads, mask, logits, weights, grad_weights, delta[:, None], visible,
            batch_head, q_idx[:, None], k_idx[None, :],
        )  # fmt: skip
        tl.static_assert(False, "Task 4.12: step 4: dS times K joins the gradient")
    return acc
