"""A hook of the forward loop for the gradient of softmax column sums."""

from typing import NamedTuple

import triton
import triton.language as tl

from stage2_triton_forward.hook import make_hook
from stage3_scores_and_sums.hooks import final_weights, load_lse, store_rows

from .grad_tiles import column_grads


class ColumnGrads(NamedTuple):
    """The args of `COLUMN_GRADS`."""

    lse_ptr: tl.tensor  # [B, Hq, M]
    result_ptr: tl.tensor  # [B, Hq, M]
    capping: tuple  # `Logits` of scale 1: the loop has scaled the logits, and not capped them
    score_grads: tuple
    LAST: tl.constexpr  # Triton 3.6 loses track of what tuples within tuples hold, unless a constexpr follows them


@triton.jit
def start_column_grads(args, place):
    """START of `add_column_grads`."""
    lse_row = args.lse_ptr + place.batch_head.to(tl.int64) * place.n_q
    return tl.zeros(place.q_idx.shape, tl.float32), load_lse(lse_row, place.q_idx, place.n_q)


@triton.jit
def add_column_grads(args, carry, logits, visible, place, k_start):
    """ON_LOGITS: add P·g of each row, g the gradient of the column sums: the softmax's backward subtracts it."""
    acc, lse_log2 = carry
    k_idx = k_start + tl.arange(0, logits.shape[1])
    weights = tl.where(visible, final_weights(args.capping, logits, 1.0, lse_log2[:, None]), 0.0)
    grads = column_grads(args.score_grads, place.batch_head, place.q_idx[:, None], k_idx[None, :])
    return acc + tl.sum(weights * grads, 1), lse_log2


@triton.jit
def store_column_grads(args, carry, state, lse_log2, begin, stop, place):
    """FINISH of `add_column_grads`."""
    store_rows(args.result_ptr, carry[0], place)


COLUMN_GRADS = make_hook(start=start_column_grads, on_logits=add_column_grads, finish=store_column_grads)
