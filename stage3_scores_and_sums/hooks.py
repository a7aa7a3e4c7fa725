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
    for k_start in range(0, tl.minimum(begin, k_stop), BLOCK):
        store_scores(args, zeros, place, k_start, tl.minimum(begin, k_stop))
    for k_start in range(stop, k_stop, BLOCK):
        store_scores(args, zeros, place, k_start, k_stop)


@triton.jit
def store_scores(args, scores, place, k_start, k_stop):
    """Store the part of a tile that lies in the queries from q_begin on and the keys before k_stop."""
    q_idx, k_idx = place.q_idx, k_start + tl.arange(0, scores.shape[1])
    head_row = place.batch_head.to(tl.int64) * (place.n_q - args.q_begin)  # 64-bit: B·Hq·M·N passes 2³¹
    head_ptr = args.scores_ptr + head_row * args.k_stop
    rows = (q_idx - args.q_begin).to(tl.int64) * args.k_stop
    inside = ((q_idx >= args.q_begin) & (q_idx < place.n_q))[:, None] & (k_idx < k_stop)[None, :]
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
    tile = scores.to(desc.dtype).reshape(1, 1, scores.shape[0], scores.shape[1])
    desc.store([place.batch, place.head, place.q_start, k_start], tile)


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
    addend = tl.sum(tl.where(visible, logits, 0.0), 1) - lost
    total = row_sum + addend
    return total, (total - row_sum) - addend


@triton.jit
def store_row_sum(args, carry, state, lse_log2, begin, stop, place):
    """FINISH of `add_row_sum`; args: RowSum."""
    store_rows(args.row_sum_ptr, carry[0], place)


ROW_SUM = make_hook(start=start_row_sum, on_logits=add_row_sum, finish=store_row_sum)


class QuerySums(NamedTuple):
    """The args of `QUERY_SUMS`."""

    sums_ptr: tl.tensor  # [B·Hq, query tiles, BLOCK_D] fp32


@triton.jit
def store_query_sums(args, place):
    """START: the sum of a tile's queries, which column sums are made of; args: QuerySums."""
    BLOCK_M: tl.constexpr = place.q_tile.shape[0]
    BLOCK_D: tl.constexpr = place.q_tile.shape[1]
    row = place.batch_head.to(tl.int64) * tl.cdiv(place.n_q, BLOCK_M) + place.q_start // BLOCK_M
    tl.store(args.sums_ptr + row * BLOCK_D + tl.arange(0, BLOCK_D), tl.sum(place.q_tile.to(tl.float32), 0))
    return ()


QUERY_SUMS = make_hook(start=store_query_sums)


class ColSum(NamedTuple):
    """The args of `COL_SUM_ATOMIC_…`: the sums over the queries from q_begin on."""

    col_sum_ptr: tl.tensor  # [B·Hk, k_stop]
    group: int  # query heads to a key head
    q_begin: int
    k_stop: int


@triton.jit
def add_col_sum_atomic(args, carry, logits, visible, place, k_start):
    """ON_LOGITS: add a tile's column sums; programs meet at the same keys, in any order; args: ColSum."""
    counted = visible & (place.q_idx >= args.q_begin)[:, None]
    sums = tl.sum(tl.where(counted, logits, 0.0), 0)
    k_idx = k_start + tl.arange(0, logits.shape[1])
    head_ptr = args.col_sum_ptr + (place.batch_head // args.group).to(tl.int64) * args.k_stop
    tl.atomic_add(head_ptr + k_idx, sums, mask=k_idx < args.k_stop, sem="relaxed")
    return carry


@triton.jit
def reversed_order(args, k_start, begin, stop, place, BLOCK_N: tl.constexpr):
    """ORDER: the last tile first. Under a causal mask, rows that start together start at different keys."""
    return begin + (tl.cdiv(stop - begin, BLOCK_N) - 1) * BLOCK_N - (k_start - begin)


@triton.jit
def round_robin(args, k_start, begin, stop, place, BLOCK_N: tl.constexpr):
    """ORDER: every tile of queries starts somewhere else, and comes round to the first key in its turn."""
    n_tiles = tl.maximum(tl.cdiv(stop - begin, BLOCK_N), 1)
    return begin + ((k_start - begin) // BLOCK_N + place.q_start // BLOCK_N) % n_tiles * BLOCK_N


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
    shift = tl.where(after.row_max == float("-inf"), 0.0, after.row_max)
    fell = tl.where(before.row_max == float("-inf"), 0.0, before.row_max - shift)
    rescale = tl.exp2(fell)
    log2_weights = tl.maximum(logits * scale_log2 - shift[:, None], -1000.0)  # 0·log(0) is 0 here
    k_idx = k_start + tl.arange(0, logits.shape[1])
    distance = tl.abs(place.q_idx[:, None] + place.offset - k_idx[None, :])
    weighted_log = (weighted_log + before.row_sum * fell) * rescale + tl.sum(weights * log2_weights, 1)
    weighted_distance = weighted_distance * rescale + tl.sum(weights * distance, 1)
    return weighted_log, weighted_distance


@triton.jit
def store_stats(args, carry, state, lse_log2, begin, stop, place):
    """FINISH of `add_stats`; args: Stats."""
    weighted_log, weighted_distance = carry
    empty = state.row_sum == 0.0
    below_lse = tl.where(empty, 0.0, lse_log2 - state.row_max)
    max_weight = tl.where(empty, 0.0, tl.exp2(-below_lse))  # the largest logit's
    entropy = max_weight * (below_lse * state.row_sum - weighted_log) * LN_2  # H = Σ p·(L - s)
    entropy = tl.where(entropy < 0.0, 0.0, entropy)  # rounding; NaN stays
    mean_distance = weighted_distance / tl.where(empty, 1.0, state.row_sum)
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
    weights = tl.where(visible, final_weights(args.capping, logits, 1.0, lse_log2[:, None]), 0.0)
    logits = tl.where(visible, logits, float("-inf"))
    k_idx = k_start + tl.arange(0, logits.shape[1])
    return args.FOLD(acc, logits, weights, place.q_idx[:, None], k_idx[None, :]), lse_log2


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
    logits, factor = cap_logits(to_logits, logits, scale)
    return tl.exp2(logits * (factor * LOG2_E) - lse_log2)


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
