"""Key-stationary: a program owns a tile of keys and walks the queries, so that a column has one owner: no atomics."""

from typing import NamedTuple

import triton
import triton.language as tl

from stage2_triton_forward.tiles import dot, load_tile, real_keys, visible_tile

from .hooks import final_weights, load_lse


class Keys(NamedTuple):
    """The tile of keys that a program owns, and the first of the heads whose queries it walks."""

    batch: int
    first_head: int
    k_idx: tl.tensor  # [BLOCK_N]
    k_tile: tl.tensor  # [BLOCK_N, BLOCK_D]


class Region(NamedTuple):
    """The part of the matrix of weights that counts: queries from q_begin to q_stop, keys before k_stop."""

    q_begin: int
    q_stop: int
    k_stop: int


@triton.jit
def column_sum_kernel(
    q_desc,  # [B, Hq, M, D]
    k_desc,  # [B, Hk, N, D]
    lse_ptr,  # [B, Hq, M], from the forward pass
    stored_ptr,  # [B, Hq, q_stop - q_begin, k_stop], logits that the forward pass has kept
    out_ptr,  # [B, Hq / HEADS, k_stop]
    loop,
    region,
    start,
    N_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    STORED: tl.constexpr,
    ADDITIVE: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Fold the columns of a key tile over the queries of HEADS heads, with `FOLD(acc, logits, weights, q_idx, k_idx)`.

    Grid: (batch·Hq / HEADS, key tiles): under a causal mask the first keys, which most queries see, start first.
    An ADDITIVE fold adds up whole tiles, and rows are summed once, at the end. Any other gets each tile transposed.
    """
    BLOCK_M: tl.constexpr = loop.tiles.BLOCK_M
    BLOCK_N: tl.constexpr = loop.tiles.BLOCK_N
    first_head = tl.program_id(0) % (N_HEADS // HEADS) * HEADS
    batch = tl.program_id(0) // (N_HEADS // HEADS)
    k_start = tl.program_id(1) * BLOCK_N
    k_idx = k_start + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k_desc, batch, first_head // loop.tiles.GROUP, k_start, BLOCK_N, loop.tiles.BLOCK_D)
    begin, whole_begin, whole_stop, stop = visible_queries(loop.mask, region, k_start, BLOCK_M, BLOCK_N)
    keys = Keys(batch, first_head, k_idx, k_tile)
    acc = tl.full([BLOCK_N], start, tl.float32)
    if ADDITIVE:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    parts = ((begin, tl.minimum(whole_begin, stop)), (whole_begin, whole_stop), (whole_stop, stop))
    EXISTS: tl.constexpr = (loop.mask.HAS_RIGHT, True, HAS_TAIL)
    for PART in tl.static_range(3):  # the diagonal; whole tiles; where the window ends, and queries that fill no tile
        if EXISTS[PART]:
            acc = fold_queries(
                acc, parts[PART][0], parts[PART][1], PART != 1,
                keys, q_desc, lse_ptr, stored_ptr, loop, region, N_HEADS, HEADS, STORED, ADDITIVE, FOLD,
            )  # fmt: skip
    if ADDITIVE:
        acc = tl.sum(acc, 0)
    if loop.mask.HAS_PADDING:  # nobody sees a key that is not real
        acc = tl.where(real_keys(loop.mask.padding_ptr, loop.mask.n_k, batch, k_idx), acc, start)
    out_row = out_ptr + tl.program_id(0).to(tl.int64) * region.k_stop
    tl.store(out_row + k_idx, acc, mask=k_idx < region.k_stop)


@triton.jit
def fold_queries(
    acc, begin, stop, MASKED: tl.constexpr,
    keys, q_desc, lse_ptr, stored_ptr, loop, region, N_HEADS: tl.constexpr, HEADS: tl.constexpr,
    STORED: tl.constexpr, ADDITIVE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Fold the queries from `begin` to `stop` of every head; one loop over both, so that loads run ahead of both."""
    BLOCK_M: tl.constexpr = loop.tiles.BLOCK_M
    n_tiles = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_M)
    # Loads run ahead of the loop: x // 0 would let the compiler assume that there is a tile.
    divisor = tl.maximum(n_tiles, 1)
    for step in tl.range(0, HEADS * n_tiles, disable_licm=MASKED):
        head = keys.first_head + step // divisor
        q_start = begin + step % divisor * BLOCK_M
        q_idx = q_start + tl.arange(0, BLOCK_M)
        head_row = keys.batch.to(tl.int64) * N_HEADS + head
        tl.static_assert(False, "Task 3.15: step 1: what the first pass has found out about these rows")
        scale = loop.to_logits.scale
        if STORED:
            stored_row = stored_ptr + head_row * (region.q_stop - region.q_begin) * region.k_stop
            offsets = (q_idx - region.q_begin).to(tl.int64)[:, None] * region.k_stop + keys.k_idx[None, :]
            inside = (q_idx < region.q_stop)[:, None] & (keys.k_idx < region.k_stop)[None, :]
            logits = tl.load(stored_row + offsets, mask=inside, other=0.0).to(tl.float32)
            scale = 1.0
        else:
            tl.static_assert(False, "Task 3.15: step 2: a tile of queries, and the logits, not scaled yet")
        tl.static_assert(False, "Task 3.15: step 3: final weights, and logits to scale; below, both where not visible")
        if MASKED:
            visible = visible_tile(loop.mask, keys.batch, q_idx, keys.k_idx) & (q_idx < region.q_stop)[:, None]
        if ADDITIVE:
            acc = FOLD(acc, logits, weights, q_idx[:, None], keys.k_idx[None, :])
        else:
            acc = FOLD(acc, tl.trans(logits), tl.trans(weights), q_idx[None, :], keys.k_idx[:, None])
    return acc


@triton.jit
def visible_queries(mask, region, k_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the queries (begin, whole_begin, whole_stop, stop) of the key tile that starts at k_start.

    No query of the region before `begin` or from `stop` on sees a key of the tile; all of the inner range see all keys
    of it (padding aside). All but `stop` lie a multiple of BLOCK_M after q_begin: the mirror image of `visible_keys`.
    """
    behind = mask.n_k - mask.n_q  # mask.offset; with a second use of that, the gradients of keys spill more registers
    last_key = tl.minimum(k_start + BLOCK_N, mask.n_k) - 1
    length = region.q_stop - region.q_begin
    tl.static_assert(False, "Task 3.14: where queries that see the tile begin and stop, and those that see all of it")
    return region.q_begin + begin, region.q_begin + whole_begin, region.q_begin + whole_stop, region.q_begin + stop
