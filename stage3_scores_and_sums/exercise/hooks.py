"""Hooks for the loops: what to do with a tile of logits or weights beside attention.

Hooks of the forward loop are sets of functions (see `stage2_triton_forward/hook.py`), put together below the last of
them; a launch gives them their args: `ROW_SUM.given(RowSum(row_sum))`. A fold takes one tile after another into an
accumulator, and leaves of a tile [R, C] the first axis: queries for rows, keys for columns.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from stage2_triton_forward.forward_kernel import cap_logits
from stage2_triton_forward.hook import make_hook
from stage2_triton_forward.tiles import LN_2, LOG2_E


@triton.jit
def long_and_short(turn, m_blocks):
    """ROWS: the longest, the shortest, the second longest …: rows of scores that compute run beside rows of zeros."""
    return tl.where(turn % 2 == 0, m_blocks - 1 - turn // 2, turn // 2)


class Scores(NamedTuple):
    """The args of `STORE_SCORES`: the scores of the queries from q_begin on and the keys before k_stop."""

    scores_ptr: tl.tensor  # [B·Hq, M - q_begin, k_stop]
    q_begin: int
    k_stop: int


@triton.jit
def store_logits(args, carry, logits, visible, place, k_start):
    """ON_LOGITS: store a tile, masked logits as 0; args: Scores."""
    store_scores(args, tl.where(visible, logits, 0.0), place, k_start, args.k_stop)
    return carry


@triton.jit
def store_zeros(args, carry, state, lse_log2, begin, stop, place):
    """FINISH of `store_logits`: the keys that the walk left out, so that each element is written exactly once."""
    BLOCK: tl.constexpr = 64
    k_stop = args.k_stop
    zeros = tl.zeros([place.q_idx.shape[0], BLOCK], tl.float32)
    tl.static_assert(False, "Task 3.2: zeros up to the first key visited, and from the last one on")


@triton.jit
def store_scores(args, scores, place, k_start, k_stop):
    """Store the part of a tile that lies in the queries from q_begin on and the keys before k_stop."""
    q_idx, k_idx = place.q_idx, k_start + tl.arange(0, scores.shape[1])
    tl.static_assert(False, "Task 3.1: where the tile's rows lie, in 64 bits, and which elements are asked for")
    tl.store(
        head_ptr + rows[:, None] + k_idx[None, :],
        scores.to(args.scores_ptr.dtype.element_ty),
        mask=inside,
        eviction_policy="evict_first",
    )


STORE_SCORES = make_hook(rows=long_and_short, on_logits=store_logits, finish=store_zeros)


@triton.jit
def store_logits_async(args, carry, logits, visible, place, k_start):
    """ON_LOGITS: `store_logits` by the copy engine, which clips tiles, and works on while the loop goes on.

    place.hook_desc: scores [B, Hq, M, N] in tiles of BLOCK_M × BLOCK_N.
    """
    store_scores_async(tl.where(visible, logits, 0.0), place, k_start)
    return carry


@triton.jit
def store_zeros_async(args, carry, state, lse_log2, begin, stop, place):
    """FINISH of `store_logits_async`."""
    desc = place.hook_desc
    BLOCK_N: tl.constexpr = desc.block_shape[3]
    zeros = tl.zeros([place.q_idx.shape[0], BLOCK_N], tl.float32)
    for k_start in range(0, begin, BLOCK_N):
        store_scores_async(zeros, place, k_start)
    for k_start in range(stop, desc.shape[3].to(tl.int32), BLOCK_N):
        store_scores_async(zeros, place, k_start)


@triton.jit
def store_scores_async(scores, place, k_start):
    """Hand a tile to the copy engine; what lies outside of the scores is dropped."""
    desc = place.hook_desc
    tl.static_assert(False, "Task 3.3: a 4-D tile for the copy engine, stored at its place")


STORE_SCORES_ASYNC = make_hook(rows=long_and_short, on_logits=store_logits_async, finish=store_zeros_async)


class RowSum(NamedTuple):
    """The args of `ROW_SUM`."""

    row_sum_ptr: tl.tensor  # [B·Hq, M]


@triton.jit
def start_row_sum(args, place):
    """START of `add_row_sum`: a sum and what rounding has taken from it."""
    return tl.zeros(place.q_idx.shape, tl.float32), tl.zeros(place.q_idx.shape, tl.float32)


@triton.jit
def add_row_sum(args, carry, logits, visible, place, k_start):
    """ON_LOGITS: add the visible logits of each row; what one addition rounds off is given back by the next.

    Source: Kahan 1965, "Further remarks on reducing truncation errors".
    """
    row_sum, lost = carry
    tl.static_assert(False, "Task 3.4: the visible logits join the sum, and what rounding takes is remembered")


@triton.jit
def store_row_sum(args, carry, state, lse_log2, begin, stop, place):
    """FINISH of `add_row_sum`; args: RowSum."""
    store_rows(args.row_sum_ptr, carry[0], place)


ROW_SUM = make_hook(start=start_row_sum, on_logits=add_row_sum, finish=store_row_sum)


class ColSum(NamedTuple):
    """The args of `COL_SUM_ATOMIC_…`: the sums over the queries from q_begin on."""

    col_sum_ptr: tl.tensor  # [B·Hk, k_stop]
    group: int  # query heads to a key head
    q_begin: int
    k_stop: int


@triton.jit
def add_col_sum_atomic(args, carry, logits, visible, place, k_start):
    """ON_LOGITS: add a tile's column sums; programs meet at the same keys, in any order; args: ColSum."""
    tl.static_assert(False, "Task 3.7: the tile's column sums, added atomically to those of its key head")
    return carry


@triton.jit
def reversed_order(args, k_start, begin, stop, place, BLOCK_N: tl.constexpr):
    """ORDER: the last tile first. Under a causal mask, rows that start together start at different keys."""
    tl.static_assert(False, "Task 3.5: the tile that mirrors this one between begin and stop")


@triton.jit
def round_robin(args, k_start, begin, stop, place, BLOCK_N: tl.constexpr):
    """ORDER: every tile of queries starts somewhere else, and comes round to the first key in its turn."""
    tl.static_assert(False, "Task 3.6: as many tiles further on as this tile of queries has before it, and round")


COL_SUM_ATOMIC_REVERSE = make_hook(order=reversed_order, on_logits=add_col_sum_atomic)
COL_SUM_ATOMIC_ROUND_ROBIN = make_hook(order=round_robin, on_logits=add_col_sum_atomic)


class Stats(NamedTuple):
    """The args of `STATS`."""

    entropy_ptr: tl.tensor  # [B·Hq, M]
    max_weight_ptr: tl.tensor  # [B·Hq, M]
    mean_distance_ptr: tl.tensor  # [B·Hq, M]


@triton.jit
def start_stats(args, place):
    """START of `add_stats`: Σ w·log2(w) and Σ w·distance, with w relative to the max so far."""
    return tl.zeros(place.q_idx.shape, tl.float32), tl.zeros(place.q_idx.shape, tl.float32)


@triton.jit
def add_stats(args, carry, before, after, logits, weights, scale_log2, place, k_start):
    """ON_WEIGHTS: what entropy and mean distance need, rescaled with the max like the output.

    When the max grows by d, every log2(w) so far falls by d, and every w by the factor 2^-d.
    """
    weighted_log, weighted_distance = carry
    tl.static_assert(False, "Task 3.16: step 1: how far log2 of the old weights falls, and log2 of the new ones")
    k_idx = k_start + tl.arange(0, logits.shape[1])
    distance = tl.abs(place.q_idx[:, None] + place.offset - k_idx[None, :])
    tl.static_assert(False, "Task 3.16: step 2: both sums, moved to the new max, and this tile's part of them")
    return weighted_log, weighted_distance


@triton.jit
def store_stats(args, carry, state, lse_log2, begin, stop, place):
    """FINISH of `add_stats`; args: Stats."""
    weighted_log, weighted_distance = carry
    empty = state.row_sum == 0.0
    tl.static_assert(False, "Task 3.17: largest weight, entropy in nats, mean distance; 0 for rows without keys")
    store_rows(args.entropy_ptr, entropy, place)
    store_rows(args.max_weight_ptr, max_weight, place)
    store_rows(args.mean_distance_ptr, mean_distance, place)


STATS = make_hook(start=start_stats, on_weights=add_stats, finish=store_stats)


class RowFold(NamedTuple):
    """The args of `FOLD_ROWS`; capitals are constexpr."""

    lse_ptr: tl.tensor  # [B·Hq, M], from an earlier pass
    result_ptr: tl.tensor  # [B·Hq, M]
    start: float
    capping: tuple  # `Logits` of scale 1: the loop has scaled the logits, and not capped them
    FOLD: tl.constexpr


@triton.jit
def start_fold(args, place):
    """START of `fold_row`: the accumulator, and the normaliser that an earlier pass has found."""
    lse_row = args.lse_ptr + place.batch_head.to(tl.int64) * place.n_q
    return tl.full(place.q_idx.shape, args.start, tl.float32), load_lse(lse_row, place.q_idx, place.n_q)


@triton.jit
def fold_row(args, carry, logits, visible, place, k_start):
    """ON_LOGITS: fold a tile of logits and final weights; args: a RowFold."""
    acc, lse_log2 = carry
    tl.static_assert(False, "Task 3.18: final weights and masked logits, and the caller's fold of them")


@triton.jit
def store_fold(args, carry, state, lse_log2, begin, stop, place):
    """FINISH of `fold_row`."""
    store_rows(args.result_ptr, carry[0], place)


FOLD_ROWS = make_hook(start=start_fold, on_logits=fold_row, finish=store_fold)


@triton.jit
def store_rows(ptr, values, place):
    """Store a statistic of each query of a tile in [B·Hq, M]."""
    tl.store(ptr + place.batch_head.to(tl.int64) * place.n_q + place.q_idx, values, mask=place.q_idx < place.n_q)


@triton.jit
def load_lse(row_ptr, q_idx, q_stop):
    """Load the lse of queries before `q_stop` in base 2; -inf where a query sees no key: mask its weights."""
    return tl.load(row_ptr + q_idx, mask=q_idx < q_stop, other=0.0) * LOG2_E


@triton.jit
def final_weights(to_logits, logits, scale, lse_log2):
    """Return the softmax weights of unscaled logits: P = e^{S - L}."""
    tl.static_assert(False, "Task 3.13: capped logits, in base 2, less the lse of their rows")


@triton.jit
def largest_weight(acc, logits, weights, q_idx, k_idx):
    """Fold: the largest weight that a key gets, or a query gives; starts at 0."""
    return tl.maximum(acc, tl.max(weights, 1))


@triton.jit
def squared_weights(acc, logits, weights, q_idx, k_idx):
    """Fold: the sum of squared weights, which tells attention paid at once from attention paid in crumbs."""
    return acc + tl.sum(weights * weights, 1)


@triton.jit
def add_weights(acc, logits, weights, q_idx, k_idx):
    """Additive fold of columns: the sum of the weights; acc has a tile's shape [BLOCK_M, BLOCK_N]."""
    return acc + weights
