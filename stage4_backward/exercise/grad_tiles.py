"""What the two gradient kernels share: the gradient of one tile of logits."""

from typing import NamedTuple

import triton
import triton.language as tl

from stage2_triton_forward.forward_kernel import cap_logits
from stage2_triton_forward.tiles import LN_2, drop_tile


class ScoreGrads(NamedTuple):
    """Gradients that reach scores and weights beside the output's; capitals are constexpr."""

    scores_ptr: tl.tensor  # [B, Hq, M, N], of the raw scores
    columns_ptr: tl.tensor  # [B, Hq / COLUMN_HEADS, k_stop] fp32, of the weights' column sums
    entropy_ptr: tl.tensor  # [B, Hq, M] fp32
    q_begin: int  # queries q_begin to q_stop and keys before k_stop were summed
    q_stop: int
    k_stop: int
    COLUMN_HEADS: tl.constexpr
    HAS_SCORES: tl.constexpr
    HAS_COLUMNS: tl.constexpr
    HAS_ENTROPY: tl.constexpr


@triton.jit
def column_grads(score_grads, batch_head, q_idx, k_idx):
    """Return the gradient of each weight that came through column sums; q_idx and k_idx broadcast to a tile."""
    row = (batch_head // score_grads.COLUMN_HEADS).to(tl.int64) * score_grads.k_stop
    columns = tl.load(score_grads.columns_ptr + row + k_idx, mask=k_idx < score_grads.k_stop, other=0.0)
    return tl.where((q_idx >= score_grads.q_begin) & (q_idx < score_grads.q_stop), columns, 0.0)


@triton.jit
def entropy_slope(weights):
    """Return dH/dP = -ln P - 1 of each weight; 0 is what stands for -ln 0, and is multiplied by the weight."""
    return tl.log2(tl.where(weights == 0.0, 1.0, weights)) * -LN_2 - 1.0


@triton.jit
def add_entropy_slope(acc, logits, weights, q_idx, k_idx):
    """Fold of rows: P·dH/dP, which the softmax's backward subtracts; it comes to the entropy less the weights' sum."""
    return acc + tl.sum(weights * entropy_slope(weights), 1)


@triton.jit
def entropy_grads(score_grads, mask, weights, batch_head, q_idx):
    """Return the gradient of each weight that came through its row's entropy."""
    row = batch_head.to(tl.int64) * mask.n_q
    return tl.load(score_grads.entropy_ptr + row + q_idx, mask=q_idx < mask.n_q, other=0.0) * entropy_slope(weights)


@triton.jit
def grad_logits(to_logits, score_grads, mask, logits, weights, grad_weights, delta, visible, batch_head, q_idx, k_idx):
    """Return the gradient of a tile's scaled scores: dS = P ∘ (dP - delta), through softcap, plus the scores' own.

    Tiles may stand either way round: q_idx, k_idx and delta broadcast to them. Source: FlashAttention-2, eq. 17.
    """
    if score_grads.HAS_COLUMNS:
        tl.static_assert(False, "Task 4.10: step 1: what reaches the weights through column sums")
    if score_grads.HAS_ENTROPY:
        grad_weights += entropy_grads(score_grads, mask, weights, batch_head, q_idx)
    tl.static_assert(False, "Task 4.10: step 2: through the softmax")
    if to_logits.HAS_SOFTCAP:
        squashed, _ = cap_logits(to_logits, logits, to_logits.scale)
        tl.static_assert(False, "Task 4.10: step 3: through the softcap")
    if score_grads.HAS_SCORES:
        offsets = q_idx.to(tl.int64) * mask.n_k + k_idx
        inside = visible & (q_idx < mask.n_q) & (k_idx < mask.n_k)
        scores_ptr = score_grads.scores_ptr + batch_head.to(tl.int64) * mask.n_q * mask.n_k
        tl.static_assert(False, "Task 4.10: step 4: the gradient that the scores have of their own")
    return grad


@triton.jit
def dropped(dropout, batch_head, q_idx, k_idx):
    """Return what dropout multiplies a tile of weights by, [BLOCK_M, BLOCK_N]: drawn again from the same seed."""
    return drop_tile(dropout, tl.full([q_idx.shape[0], k_idx.shape[0]], 1.0, tl.float32), batch_head, q_idx, k_idx)
