"""Sums of raw scores without the scores: s·x_i·Σ y_t over the interval of y that x_i pairs with, in O(N·D).

For row sums x are queries and y keys; for column sums x are keys and y queries, added up over their group of heads.
`CHUNK` rows of x meet `CHUNK` rows of y at each end of their intervals; all that lies between the ends is one vector.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from stage2_triton_forward.tiles import dot, load_tile, real_keys


class Rows(NamedTuple):
    """Rows y_begin to y_stop of y count, real ones only; capitals are constexpr."""

    y_begin: int
    y_stop: int
    padding_ptr: tl.tensor  # [B, N], nonzero for a real key
    n_keys: int
    X_PADDED: tl.constexpr  # x are the keys
    Y_PADDED: tl.constexpr  # y are the keys
    CHUNK: tl.constexpr
    BLOCK_D: tl.constexpr
    FP32_PRECISION: tl.constexpr  # of tl.dot


class Ends(NamedTuple):
    """Row i of x pairs with rows i + left to i + right of y; prefix sums are of chunks that start where an end lies."""

    to_left_ptr: tl.tensor  # [B, N_SUMS, left_chunks, BLOCK_D] fp64
    to_right_ptr: tl.tensor  # [B, N_SUMS, right_chunks, BLOCK_D] fp64
    left: int
    right: int
    left_first: int  # where the first chunk starts: at 0 or before, a whole number of chunks away from left
    right_first: int
    left_chunks: int
    right_chunks: int
    HAS_LEFT: tl.constexpr
    HAS_RIGHT: tl.constexpr
    TILE: tl.constexpr  # not 0: to_left_ptr [B, Hy, left_chunks, BLOCK_D] fp32 holds the sums of tiles of so many rows


@triton.jit
def chunk_sum_kernel(y_desc, sums_ptr, rows, first, N_SUMS: tl.constexpr, Y_HEADS: tl.constexpr):
    """Sum each chunk of y: chunk c holds the rows from `first` + c·CHUNK on.

    Grid: (chunks, batch·N_SUMS). sums: [B, N_SUMS, chunks, BLOCK_D] fp64, each of Y_HEADS heads.
    """
    CHUNK: tl.constexpr = rows.CHUNK
    tl.static_assert(False, "Task 3.8: step 1: the chunk's rows, which of them count, and the first of its heads")
    total = tl.zeros([CHUNK, rows.BLOCK_D], tl.float32)
    for head in tl.range(first_head, first_head + Y_HEADS, num_stages=3):
        y_tile = load_tile(y_desc, batch, head, y_start, CHUNK, rows.BLOCK_D).to(tl.float32)
        tl.static_assert(False, "Task 3.8: step 2: the rows that count join the total")
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + row * rows.BLOCK_D + tl.arange(0, rows.BLOCK_D), tl.sum(total, 0).to(tl.float64))


@triton.jit
def prefix_sum_kernel(sums_ptr, n_chunks, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr):
    """Replace the chunks' sums by their prefix sums, in place.

    Grid: (batch·N_SUMS, BLOCK_D / WIDTH). sums: [B·N_SUMS, n_chunks, BLOCK_D] fp64.
    """
    d_idx = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    head_ptr = sums_ptr + tl.program_id(0).to(tl.int64) * n_chunks * BLOCK_D
    before = tl.zeros([WIDTH], tl.float64)
    for start in range(0, n_chunks, BLOCK):
        c_idx = start + tl.arange(0, BLOCK)
        cells = head_ptr + c_idx[:, None] * BLOCK_D + d_idx[None, :]
        inside = (c_idx < n_chunks)[:, None]
        chunks = tl.load(cells, mask=inside, other=0.0)
        tl.static_assert(False, "Task 3.9: prefix sums in the place of the chunks, and what the next block begins with")


@triton.jit
def interval_sum_kernel(
    x_desc,  # [B, Hx, Nx, D]
    y_desc,  # [B, Hy, Ny, D]
    out_ptr,  # [B, Hx, n_out]
    rows,
    ends,
    n_out,
    scale,
    N_SUMS: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_HEADS: tl.constexpr,
):
    """Compute scale·x_i·Σ y_t over i + left <= t < i + right for one chunk of x; a side without an end has no bound.

    Grid: (chunks of x, batch·N_SUMS); a program takes the X_GROUP heads of x that share a sum. Intervals overlap almost
    entirely, so that their sums are differences of prefix sums, taken in fp64; only at its ends does each row of x
    count a part of a chunk of its own.
    """
    CHUNK: tl.constexpr = rows.CHUNK
    x_start = tl.program_id(0) * CHUNK
    x_idx = x_start + tl.arange(0, CHUNK)
    sums = tl.program_id(1)
    batch = sums // N_SUMS
    if ends.TILE > 0:
        between = between_from_tiles(ends, rows, y_desc, sums, x_start, N_SUMS, Y_HEADS, ends.TILE)
    else:
        between = between_ends(ends, rows, sums, x_start)
    counts_x = x_idx < n_out
    at_ends = tl.zeros([CHUNK, CHUNK], tl.float32)
    for step in tl.range(0, X_GROUP * Y_HEADS):  # queries have a group of heads, keys one
        x_head = sums % N_SUMS * X_GROUP + step // Y_HEADS
        y_head = sums % N_SUMS * Y_HEADS + step % Y_HEADS
        x_tile = load_tile(x_desc, batch, x_head, x_start, CHUNK, rows.BLOCK_D)
        tl.static_assert(False, "Task 3.11: step 1: what the chunks at both ends add and take away, element by element")
        if step % Y_HEADS == Y_HEADS - 1:
            tl.static_assert(False, "Task 3.11: step 2: the row sums of both parts")
            if rows.X_PADDED:
                acc = tl.where(real_keys(rows.padding_ptr, rows.n_keys, batch, x_idx), acc, 0.0)
            out_row = out_ptr + (sums * X_GROUP + step // Y_HEADS).to(tl.int64) * n_out
            tl.store(out_row + x_idx, acc * scale, mask=counts_x)
            at_ends = tl.zeros([CHUNK, CHUNK], tl.float32)


@triton.jit
def between_ends(ends, rows, sums, x_start):
    """Return the sum of the chunks between both ends of the chunk of x that starts at x_start, [BLOCK_D] fp32."""
    CHUNK: tl.constexpr = rows.CHUNK
    tl.static_assert(False, "Task 3.10: a difference of prefix sums, in fp64 until it is taken")


@triton.jit
def between_from_tiles(
    ends, rows, y_desc, sums, x_start, N_SUMS: tl.constexpr, Y_HEADS: tl.constexpr, TILE: tl.constexpr
):
    """Return what `between_ends` does, from the sums of whole tiles and the rows that are left at either end."""
    start = rows.y_begin
    stop = rows.y_stop
    if ends.HAS_LEFT:
        start = tl.minimum(tl.maximum(x_start + ends.left, rows.y_begin), rows.y_stop)
    if ends.HAS_RIGHT:
        stop = tl.minimum(tl.maximum(x_start + ends.right, rows.y_begin), rows.y_stop)
    first_tile = tl.cdiv(start, TILE)
    last_tile = stop // TILE
    head_edge = tl.minimum(first_tile * TILE, stop)
    tail_edge = tl.maximum(last_tile * TILE, head_edge)
    between = tl.zeros([rows.BLOCK_D], tl.float64)
    for head in range(sums % N_SUMS * Y_HEADS, sums % N_SUMS * Y_HEADS + Y_HEADS):
        head_row = ((sums // N_SUMS * N_SUMS * Y_HEADS + head) * ends.left_chunks).to(tl.int64)
        for tile in range(first_tile, last_tile, 16):
            t_idx = tile + tl.arange(0, 16)
            cells = ends.to_left_ptr + (head_row + t_idx)[:, None] * rows.BLOCK_D + tl.arange(0, rows.BLOCK_D)[None, :]
            between += tl.sum(tl.load(cells, mask=(t_idx < last_tile)[:, None], other=0.0).to(tl.float64), 0)
        between += sum_of_rows(y_desc, rows, sums // N_SUMS, head, start, head_edge)
        between += sum_of_rows(y_desc, rows, sums // N_SUMS, head, tail_edge, stop)
    return between.to(tl.float32)


@triton.jit
def sum_of_rows(y_desc, rows, batch, head, start, stop):
    """Return the sum of the rows of y from `start` to `stop`, [BLOCK_D] fp64."""
    CHUNK: tl.constexpr = rows.CHUNK
    total = tl.zeros([rows.BLOCK_D], tl.float64)
    for y_start in range(start, stop, CHUNK):
        counts = y_start + tl.arange(0, CHUNK) < stop
        y_tile = load_tile(y_desc, batch, head, y_start, CHUNK, rows.BLOCK_D).to(tl.float32)
        total += tl.sum(tl.where(counts[:, None], y_tile, 0.0), 0).to(tl.float64)
    return total


@triton.jit
def prefix(sums_ptr, sums, n_before, n_chunks, BLOCK_D: tl.constexpr):
    """Return the sum of the first `n_before` chunks, [BLOCK_D] fp64."""
    last = tl.minimum(n_before, n_chunks) - 1
    cells = sums_ptr + (sums.to(tl.int64) * n_chunks + last) * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.load(cells, mask=(last >= 0) & (tl.arange(0, BLOCK_D) >= 0), other=0.0)


@triton.jit
def chunk_at_end(x_tile, y_desc, rows, batch, y_head, y_start):
    """Return x_m·y_(y_start + n) for n < m, else 0, [CHUNK, CHUNK]: the m-th row's end lies m rows past the first's."""
    CHUNK: tl.constexpr = rows.CHUNK
    idx = tl.arange(0, CHUNK)
    tl.static_assert(False, "Task 3.12: a tile of products, of which row m counts the first m")


@triton.jit
def counted(rows, batch, y_idx):
    """Return which rows of y count: the padding is taken from the keys."""
    counts = (y_idx >= rows.y_begin) & (y_idx < rows.y_stop)
    if rows.Y_PADDED:
        counts = counts & real_keys(rows.padding_ptr, rows.n_keys, batch, y_idx)
    return counts
