"""The one forward loop: a program owns a tile of queries and walks the keys. Variants are hooks and constexprs."""

from typing import NamedTuple

import triton
import triton.language as tl

from .hook import Place
from .tiles import (
    LN_2,
    LOG2_E,
    Dropout,
    Mask,
    SoftmaxState,
    dot,
    drop_tile,
    load_tile,
    online_softmax_step,
    store_tile,
    tanh,
    visible_keys,
    visible_tile,
)


class Logits(NamedTuple):
    """How q·kᵀ becomes logits: scaled, then softcapped. `scale` is positive; capitals are constexpr."""

    scale: float
    softcap: float
    HAS_SOFTCAP: tl.constexpr
    FP32_PRECISION: tl.constexpr  # of tl.dot


class Tiles(NamedTuple):
    """Sizes known at compile time."""

    GROUP: tl.constexpr  # query heads to a key head
    BLOCK_M: tl.constexpr
    BLOCK_N: tl.constexpr
    BLOCK_D: tl.constexpr
    BLOCK_DV: tl.constexpr


class Loop(NamedTuple):
    """What every loop over tiles is told. Launches build it: within a kernel, assigned tuples lose their constexprs."""

    mask: Mask
    to_logits: Logits
    dropout: Dropout
    tiles: Tiles


@triton.jit
def forward_kernel(
    q_desc,  # [B, Hq, M, D]
    k_desc,  # [B, Hk, N, D]
    v_desc,  # [B, Hk, N, Dv]
    out_desc,  # [splits·B, Hq, M, Dv]
    lse_ptr,  # [splits·B, Hq, M]
    sinks_ptr,  # [Hq]
    descale_ptr,  # [2]: factors on q·kᵀ and on v, for fp8
    hook_desc,  # the hook's own, or any
    loop,
    hook,
    n_batches,
    heads_together,
    N_HEADS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_DESCALE: tl.constexpr,
    COMPUTE_OUTPUT: tl.constexpr,
):
    """Attention of one query tile, with a caller's hook at each of its tiles of logits and weights (see `hook.py`).

    Grid: (query tiles of all heads, splits of the keys). Heads come `heads_together` at a time, so that their keys and
    values stay in L2; among those, the longest causal rows of every head come first, so that no long row starts last.
    Source: FlashAttention-2 (Dao 2023), Algorithm 1.
    """
    BLOCK_M: tl.constexpr = loop.tiles.BLOCK_M
    BLOCK_N: tl.constexpr = loop.tiles.BLOCK_N
    BLOCK_DV: tl.constexpr = loop.tiles.BLOCK_DV
    m_blocks = tl.cdiv(loop.mask.n_q, BLOCK_M)
    first_head = tl.program_id(0) // (heads_together * m_blocks) * heads_together
    n_together = tl.minimum(heads_together, n_batches * N_HEADS - first_head)
    within = tl.program_id(0) - first_head * m_blocks
    batch_head = first_head + within % n_together
    q_start = hook.ROWS(within // n_together, m_blocks) * BLOCK_M
    batch = batch_head // N_HEADS
    head = batch_head % N_HEADS

    begin, whole_begin, whole_stop, stop = visible_keys(loop.mask, q_start, BLOCK_M, BLOCK_N)
    if N_SPLITS > 1:
        keys_per_split = tl.cdiv(tl.cdiv(loop.mask.n_k, BLOCK_N), N_SPLITS) * BLOCK_N
        split_begin = tl.program_id(1) * keys_per_split
        split_stop = split_begin + keys_per_split
        begin = tl.maximum(begin, split_begin)
        stop = tl.minimum(stop, split_stop)
        whole_begin = tl.maximum(whole_begin, split_begin)
        whole_stop = tl.maximum(tl.minimum(whole_stop, split_stop), whole_begin)

    q_tile = load_tile(q_desc, batch, head, q_start, BLOCK_M, loop.tiles.BLOCK_D)
    scale = loop.to_logits.scale
    if HAS_DESCALE:
        scale = scale * tl.load(descale_ptr)
    q_idx = q_start + tl.arange(0, BLOCK_M)
    state = SoftmaxState(
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
    )
    place = Place(batch, head, batch_head, q_start, q_idx, q_tile, loop.mask.n_q, loop.mask.offset, hook_desc)
    carry = hook.START(hook.args, place)
    parts = ((begin, tl.minimum(whole_begin, stop)), (whole_begin, whole_stop), (whole_stop, stop))
    EXISTS: tl.constexpr = (loop.mask.HAS_LEFT, True, HAS_TAIL)
    for PART in tl.static_range(3):  # where the window begins; whole tiles; the diagonal, and keys that fill no tile
        if EXISTS[PART]:
            state, carry = attend_keys(
                state, carry, parts[PART][0], parts[PART][1], PART != 1,
                scale, k_desc, v_desc, loop, hook, place, COMPUTE_OUTPUT,
            )  # fmt: skip

    lse_log2 = state.row_max
    if COMPUTE_OUTPUT:
        row_sum = tl.where(state.row_sum == 0.0, 1.0, state.row_sum)
        factor = 1.0 / row_sum
        lse_log2 = state.row_max + tl.log2(row_sum)  # L = m + log(l), -inf for a row without keys
        if HAS_SINKS:
            factor, lse_log2 = add_sink(factor, lse_log2, tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E)
        if HAS_DESCALE:
            factor *= tl.load(descale_ptr + 1)
        out_batch = batch
        if N_SPLITS > 1:
            out_batch = tl.program_id(1) * n_batches + batch
        store_tile(
            out_desc, state.acc * factor[:, None], out_batch, head, q_start, BLOCK_M, BLOCK_DV
        )  # O = diag(l)⁻¹·O
        lse_row = lse_ptr + (out_batch.to(tl.int64) * N_HEADS + head) * loop.mask.n_q
        tl.store(lse_row + q_idx, lse_log2 * LN_2, mask=q_idx < loop.mask.n_q)
    visited_stop = tl.maximum(begin, tl.cdiv(stop, BLOCK_N) * BLOCK_N)
    hook.FINISH(hook.args, carry, state, lse_log2, begin, visited_stop, place)


@triton.jit
def attend_keys(
    state, carry, begin, stop, MASKED: tl.constexpr,
    scale, k_desc, v_desc, loop, hook, place, COMPUTE_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Take the keys from `begin` to `stop` into the state; with MASKED, check who sees whom element by element."""
    BLOCK_N: tl.constexpr = loop.tiles.BLOCK_N
    kv_head = place.head // loop.tiles.GROUP
    for k_start in tl.range(begin, stop, BLOCK_N, disable_licm=MASKED):
        k_start = hook.ORDER(hook.args, k_start, begin, stop, place, BLOCK_N)
        k_start = tl.multiple_of(k_start, BLOCK_N)
        k_idx = k_start + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k_desc, place.batch, kv_head, k_start, BLOCK_N, loop.tiles.BLOCK_D)
        logits = dot(place.q_tile, k_tile.T, None, loop.to_logits.FP32_PRECISION)  # S = Q·Kᵀ, unscaled
        in_rows = (place.q_idx < loop.mask.n_q)[:, None]
        if MASKED or loop.mask.HAS_PADDING:
            visible = visible_tile(loop.mask, place.batch, place.q_idx, k_idx)
            in_rows = visible & in_rows
        carry = hook.ON_LOGITS(hook.args, carry, logits * scale, in_rows, place, k_start)
        if COMPUTE_OUTPUT:
            logits, factor = cap_logits(loop.to_logits, logits, scale)
            if MASKED or loop.mask.HAS_PADDING:
                logits = tl.where(visible, logits, float("-inf"))
            before = state
            state, weights = online_softmax_step(state, logits, factor * LOG2_E)
            carry = hook.ON_WEIGHTS(hook.args, carry, before, state, logits, weights, factor * LOG2_E, place, k_start)
            if loop.dropout.ENABLED:
                weights = drop_tile(loop.dropout, weights, place.batch_head, place.q_idx, k_idx)
            v_tile = load_tile(v_desc, place.batch, kv_head, k_start, BLOCK_N, loop.tiles.BLOCK_DV)
            if v_tile.dtype.primitive_bitwidth == 8:  # fp8 weights would lose what the logits gained
                v_tile = v_tile.to(tl.bfloat16)
            acc = dot(weights.to(v_tile.dtype), v_tile, state.acc, loop.to_logits.FP32_PRECISION)
            state = SoftmaxState(state.row_max, state.row_sum, acc)
    return state, carry


@triton.jit
def cap_logits(to_logits, logits, scale):
    """Return (x, factor) such that x·factor are the capped logits of unscaled ones; without softcap nothing is done."""
    factor = scale
    if to_logits.HAS_SOFTCAP:
        logits = tanh(logits * (scale / to_logits.softcap))
        factor = to_logits.softcap
    return logits, factor


@triton.jit
def add_sink(factor, lse_log2, sink_log2):
    """Enlarge the denominator of rows that saw a key by one extra logit; return the output's factor and the lse."""
    larger = tl.maximum(lse_log2, sink_log2)
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    with_sink = shift + tl.log2(tl.exp2(lse_log2 - shift) + tl.exp2(sink_log2 - shift))
    saw_nothing = lse_log2 == float("-inf")
    factor = tl.where(saw_nothing, factor, factor * tl.exp2(lse_log2 - with_sink))
    return factor, tl.where(saw_nothing, lse_log2, with_sink)
