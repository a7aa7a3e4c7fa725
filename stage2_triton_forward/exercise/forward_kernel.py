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
    tl.static_assert(False, "Task 2.7: step 1: this program's head and query tile, the longest rows first")

    begin, whole_begin, whole_stop, stop = visible_keys(loop.mask, q_start, BLOCK_M, BLOCK_N)
    if N_SPLITS > 1:
        tl.static_assert(False, "Task 2.10: which keys are this split's; cut the four positions to them")

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
        tl.static_assert(False, "Task 2.7: step 2: the output's factor, and the lse in base 2")
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
    for k_start in tl.range(begin, stop, BLOCK_N, disable_licm=MASKED):
        k_start = hook.ORDER(hook.args, k_start, begin, stop, place, BLOCK_N)
        k_start = tl.multiple_of(k_start, BLOCK_N)
        k_idx = k_start + tl.arange(0, BLOCK_N)
        tl.static_assert(False, "Task 2.6: step 1: the key head, a tile of its keys, and the logits, not scaled yet")
        in_rows = (place.q_idx < loop.mask.n_q)[:, None]
        if MASKED or loop.mask.HAS_PADDING:
            visible = visible_tile(loop.mask, place.batch, place.q_idx, k_idx)
            in_rows = visible & in_rows
        carry = hook.ON_LOGITS(hook.args, carry, logits * scale, in_rows, place, k_start)
        if COMPUTE_OUTPUT:
            logits, factor = cap_logits(loop.to_logits, logits, scale)
            tl.static_assert(False, "Task 2.6: step 2: mask where needed; below, after `before`, the softmax step")
            before = state
            carry = hook.ON_WEIGHTS(hook.args, carry, before, state, logits, weights, factor * LOG2_E, place, k_start)
            if loop.dropout.ENABLED:
                weights = drop_tile(loop.dropout, weights, place.batch_head, place.q_idx, k_idx)
            tl.static_assert(False, "Task 2.6: step 3: a tile of v, and below, weights times v joins the output")
            if v_tile.dtype.primitive_bitwidth == 8:  # fp8 weights would lose what the logits gained
                v_tile = v_tile.to(tl.bfloat16)
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
    tl.static_assert(False, "Task 2.8: the sink joins the denominator; empty rows stay as they are")
