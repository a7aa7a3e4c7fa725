"""Gradient of the queries: query-stationary, like the forward pass, with the weights computed again from the lse."""

from typing import NamedTuple

import triton
import triton.language as tl

from stage2_triton_forward.tiles import dot, load_tile, store_tile, visible_keys, visible_tile
from stage3_scores_and_sums.hooks import final_weights, load_lse

from .grad_tiles import dropped, grad_logits


class Queries(NamedTuple):
    """The tile of queries that a program owns."""

    batch: int
    head: int
    batch_head: int  # batch·Hq + head
    q_idx: tl.tensor  # [BLOCK_M]
    q_tile: tl.tensor  # [BLOCK_M, BLOCK_D]
    grad_out: tl.tensor  # [BLOCK_M, BLOCK_DV]
    lse_log2: tl.tensor  # [BLOCK_M]
    delta: tl.tensor  # [BLOCK_M]


@triton.jit
def grad_q_kernel(
    q_desc,  # [B, Hq, M, D]
    k_desc,  # [B, Hk, N, D]
    v_desc,  # [B, Hk, N, Dv]
    grad_out_desc,  # [B, Hq, M, Dv]
    grad_q_desc,  # [B, Hq, M, D]
    lse_ptr,  # [B, Hq, M]
    delta_ptr,  # [B, Hq, M]
    loop,
    score_grads,
    N_HEADS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """Compute dQ = s·dS·K of one query tile.

    Grid: (batch·Hq, query tiles), the longest causal rows first. Source: FlashAttention-2, eq. 18.
    """
    BLOCK_M: tl.constexpr = loop.tiles.BLOCK_M
    batch_head = tl.program_id(0)
    batch = batch_head // N_HEADS
    head = batch_head % N_HEADS
    q_start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_idx = q_start + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q_desc, batch, head, q_start, BLOCK_M, loop.tiles.BLOCK_D)
    grad_out = load_tile(grad_out_desc, batch, head, q_start, BLOCK_M, loop.tiles.BLOCK_DV)
    row = batch_head.to(tl.int64) * loop.mask.n_q
    lse_log2 = load_lse(lse_ptr + row, q_idx, loop.mask.n_q)
    delta = tl.load(delta_ptr + row + q_idx, mask=q_idx < loop.mask.n_q, other=0.0)
    begin, whole_begin, whole_stop, stop = visible_keys(loop.mask, q_start, BLOCK_M, loop.tiles.BLOCK_N)
    queries = Queries(batch, head, batch_head, q_idx, q_tile, grad_out, lse_log2, delta)
    acc = tl.zeros([BLOCK_M, loop.tiles.BLOCK_D], tl.float32)
    parts = ((begin, tl.minimum(whole_begin, stop)), (whole_begin, whole_stop), (whole_stop, stop))
    EXISTS: tl.constexpr = (loop.mask.HAS_LEFT, True, HAS_TAIL)
    for PART in tl.static_range(3):  # where the window begins; whole tiles; the diagonal, and keys that fill no tile
        if EXISTS[PART]:
            acc = walk_keys(acc, parts[PART][0], parts[PART][1], PART != 1, queries, k_desc, v_desc, loop, score_grads)
    grad_q = acc * loop.to_logits.scale  # dQ = s·dS·K
    store_tile(grad_q_desc, grad_q, batch, head, q_start, BLOCK_M, loop.tiles.BLOCK_D)


@triton.jit
def walk_keys(acc, begin, stop, MASKED: tl.constexpr, queries, k_desc, v_desc, loop, score_grads):
    """Add what the keys from `begin` to `stop` give to the gradient of a query tile."""
    BLOCK_N: tl.constexpr = loop.tiles.BLOCK_N
    kv_head = queries.head // loop.tiles.GROUP
    for k_start in tl.range(begin, stop, BLOCK_N, disable_licm=MASKED):
        k_start = tl.multiple_of(k_start, BLOCK_N)
        k_idx = k_start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_desc, queries.batch, kv_head, k_start, BLOCK_N, loop.tiles.BLOCK_D)
        v_tile = load_tile(v_desc, queries.batch, kv_head, k_start, BLOCK_N, loop.tiles.BLOCK_DV)
        logits = dot(queries.q_tile, k_tile.T, None, loop.to_logits.FP32_PRECISION)  # S = Q·Kᵀ
        grad_weights = dot(queries.grad_out, v_tile.T, None, loop.to_logits.FP32_PRECISION)  # dP = dO·Vᵀ
        lse_log2 = queries.lse_log2[:, None]
        weights = final_weights(loop.to_logits, logits, loop.to_logits.scale, lse_log2)  # P = e^{S - L}
        visible = (queries.q_idx < loop.mask.n_q)[:, None]
        if MASKED or loop.mask.HAS_PADDING:
            visible = visible_tile(loop.mask, queries.batch, queries.q_idx, k_idx)
            weights = tl.where(visible, weights, 0.0)
        if loop.dropout.ENABLED:
            grad_weights *= dropped(loop.dropout, queries.batch_head, queries.q_idx, k_idx)
        grad = grad_logits(
            loop.to_logits, score_grads, loop.mask, logits, weights, grad_weights, queries.delta[:, None], visible,
            queries.batch_head, queries.q_idx[:, None], k_idx[None, :],
        )  # fmt: skip
        acc = dot(grad.to(k_tile.dtype), k_tile, acc, loop.to_logits.FP32_PRECISION)
    return acc
