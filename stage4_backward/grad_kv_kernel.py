"""Gradients of keys and values: key-stationary, so that each has one owner and nothing is added atomically."""

from typing import NamedTuple

import triton
import triton.language as tl

from stage2_triton_forward.tiles import dot, load_tile, store_tile, visible_tile
from stage3_scores_and_sums.column_sum_kernel import visible_queries
from stage3_scores_and_sums.hooks import final_weights, load_lse

from .grad_tiles import dropped, grad_logits


class Keys(NamedTuple):
    """The tile of keys, with their values, that a program owns."""

    batch: int
    kv_head: int
    k_idx: tl.tensor  # [BLOCK_N]
    k_tile: tl.tensor  # [BLOCK_N, BLOCK_D]
    v_tile: tl.tensor  # [BLOCK_N, BLOCK_DV]


@triton.jit
def grad_kv_kernel(
    q_desc,  # [B, Hq, M, D]
    k_desc,  # [B, Hk, N, D]
    v_desc,  # [B, Hk, N, Dv]
    grad_out_desc,  # [B, Hq, M, Dv]
    grad_k_desc,  # [B, Hk, N, D]
    grad_v_desc,  # [B, Hk, N, Dv]
    lse_ptr,  # [B, Hq, M]
    delta_ptr,  # [B, Hq, M]
    loop,
    score_grads,
    region,
    N_HEADS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """Compute dV = Pᵀ·dO and dK = s·dSᵀ·Q of one key tile, summed over the query heads that share it.

    Grid: (batch·Hk, key tiles): under a causal mask the first keys, which most queries see, start first.
    Source: FlashAttention-2 (Dao 2023), Algorithm 2; eq. 15 and 19.
    """
    BLOCK_N: tl.constexpr = loop.tiles.BLOCK_N
    kv_heads: tl.constexpr = N_HEADS // loop.tiles.GROUP
    batch = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    k_start = tl.program_id(1) * BLOCK_N
    k_idx = k_start + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k_desc, batch, kv_head, k_start, BLOCK_N, loop.tiles.BLOCK_D)
    v_tile = load_tile(v_desc, batch, kv_head, k_start, BLOCK_N, loop.tiles.BLOCK_DV)
    begin, whole_begin, whole_stop, stop = visible_queries(loop.mask, region, k_start, loop.tiles.BLOCK_M, BLOCK_N)
    keys = Keys(batch, kv_head, k_idx, k_tile, v_tile)
    grad_k = tl.zeros([BLOCK_N, loop.tiles.BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, loop.tiles.BLOCK_DV], tl.float32)
    parts = ((begin, tl.minimum(whole_begin, stop)), (whole_begin, whole_stop), (whole_stop, stop))
    EXISTS: tl.constexpr = (loop.mask.HAS_RIGHT, True, HAS_TAIL)
    for PART in tl.static_range(3):  # the diagonal; whole tiles; where the window ends, and queries that fill no tile
        if EXISTS[PART]:
            grad_k, grad_v = walk_queries(
                grad_k, grad_v, parts[PART][0], parts[PART][1], PART != 1,
                keys, q_desc, grad_out_desc, lse_ptr, delta_ptr, loop, score_grads, N_HEADS,
            )  # fmt: skip
    store_tile(grad_k_desc, grad_k * loop.to_logits.scale, batch, kv_head, k_start, BLOCK_N, loop.tiles.BLOCK_D)
    store_tile(grad_v_desc, grad_v, batch, kv_head, k_start, BLOCK_N, loop.tiles.BLOCK_DV)


@triton.jit
def walk_queries(
    grad_k, grad_v, begin, stop, MASKED: tl.constexpr,
    keys, q_desc, grad_out_desc, lse_ptr, delta_ptr, loop, score_grads, N_HEADS: tl.constexpr,
):  # fmt: skip
    """Add what the queries from `begin` to `stop` of every head of the group give; tiles stand as Sᵀ = K·Qᵀ."""
    BLOCK_M: tl.constexpr = loop.tiles.BLOCK_M
    n_tiles = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_M)
    divisor = tl.maximum(n_tiles, 1)  # loads run ahead of the loop, where x // 0 would mean that there is a tile
    for step in tl.range(0, n_tiles * loop.tiles.GROUP, disable_licm=MASKED):
        head = keys.kv_head * loop.tiles.GROUP + step // divisor
        q_start = begin + step % divisor * BLOCK_M
        q_idx = q_start + tl.arange(0, BLOCK_M)
        batch_head = keys.batch * N_HEADS + head
        row = batch_head.to(tl.int64) * loop.mask.n_q
        q_tile = load_tile(q_desc, keys.batch, head, q_start, BLOCK_M, loop.tiles.BLOCK_D)
        lse_log2 = load_lse(lse_ptr + row, q_idx, loop.mask.n_q)
        logits = dot(keys.k_tile, q_tile.T, None, loop.to_logits.FP32_PRECISION)  # Sᵀ, [BLOCK_N, BLOCK_M]
        grad_out = load_tile(grad_out_desc, keys.batch, head, q_start, BLOCK_M, loop.tiles.BLOCK_DV)
        delta = tl.load(delta_ptr + row + q_idx, mask=q_idx < loop.mask.n_q, other=0.0)
        grad_weights = dot(keys.v_tile, grad_out.T, None, loop.to_logits.FP32_PRECISION)  # dPᵀ = V·dOᵀ
        weights = final_weights(loop.to_logits, logits, loop.to_logits.scale, lse_log2[None, :])  # Pᵀ
        visible = (keys.k_idx < loop.mask.n_k)[:, None]
        if MASKED or loop.mask.HAS_PADDING:
            visible = visible_tile(loop.mask, keys.batch, q_idx, keys.k_idx) & (q_idx < loop.mask.n_q)[:, None]
            visible = tl.trans(visible)
            weights = tl.where(visible, weights, 0.0)
        kept = weights
        if loop.dropout.ENABLED:
            factor = tl.trans(dropped(loop.dropout, batch_head, q_idx, keys.k_idx))
            kept = weights * factor
            grad_weights *= factor
        grad_v = dot(kept.to(grad_out.dtype), grad_out, grad_v, loop.to_logits.FP32_PRECISION)  # dV += Pᵀ·dO
        grad = grad_logits(
            loop.to_logits, score_grads, loop.mask, logits, weights, grad_weights, delta[None, :], visible,
            batch_head, q_idx[None, :], keys.k_idx[:, None],
        )  # fmt: skip
        grad_k = dot(grad.to(q_tile.dtype), q_tile, grad_k, loop.to_logits.FP32_PRECISION)  # dK += dSᵀ·Q
    return grad_k, grad_v
