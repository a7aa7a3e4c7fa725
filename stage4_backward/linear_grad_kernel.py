"""Sums of vectors over intervals: what the gradients of the raw sums are made of, in O(N·D)."""

import triton
import triton.language as tl

from stage2_triton_forward.tiles import dot, load_tile, real_keys
from stage3_scores_and_sums.linear_sum_kernel import between_ends, counted


@triton.jit
def interval_vector_kernel(
    y_desc,  # [B, Hy, Ny, D]
    factor_ptr,  # [B, Hx, n_out]
    out_ptr,  # [B, Hx, n_out, D]
    rows,
    ends,
    n_out,
    scale,
    HEAD_DIM: tl.constexpr,
    N_SUMS: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_HEADS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
):
    """Compute scale·factor_i·Σ y_t over i + left <= t < i + right, a vector for each i.

    Grid: (chunks of x, batch·N_SUMS). As in `interval_sum_kernel`, but nothing is multiplied with x: a triangle of ones
    adds up the chunk at an end.
    """
    CHUNK: tl.constexpr = rows.CHUNK
    x_start = tl.program_id(0) * CHUNK
    x_idx = x_start + tl.arange(0, CHUNK)
    d_idx = tl.arange(0, rows.BLOCK_D)
    sums = tl.program_id(1)
    batch = sums // N_SUMS
    acc = tl.zeros([CHUNK, rows.BLOCK_D], tl.float32)
    for head in range(sums % N_SUMS * Y_HEADS, sums % N_SUMS * Y_HEADS + Y_HEADS):
        if ends.HAS_RIGHT:
            acc += triangle(y_desc, rows, batch, head, x_start + ends.right)
        if ends.HAS_LEFT:
            acc -= triangle(y_desc, rows, batch, head, x_start + ends.left)
    acc += between_ends(ends, rows, sums, x_start)[None, :]
    if rows.X_PADDED:
        acc = tl.where(real_keys(rows.padding_ptr, rows.n_keys, batch, x_idx)[:, None], acc, 0.0)
    inside = (x_idx < n_out)[:, None] & (d_idx < HEAD_DIM)[None, :]
    for x_head in range(X_GROUP):
        row = (sums * X_GROUP + x_head).to(tl.int64) * n_out
        result = acc * scale
        if HAS_FACTOR:
            result *= tl.load(factor_ptr + row + x_idx, mask=x_idx < n_out, other=0.0)[:, None]
        cells = out_ptr + (row + x_idx)[:, None] * HEAD_DIM + d_idx[None, :]
        tl.store(cells, result, mask=inside)


@triton.jit
def triangle(y_desc, rows, batch, head, y_start):
    """Return Σ_n y_(y_start + n) over n < m, [CHUNK, BLOCK_D]: the m-th row's end lies m rows past the first's."""
    CHUNK: tl.constexpr = rows.CHUNK
    idx = tl.arange(0, CHUNK)
    counts = counted(rows, batch, y_start + idx)
    y_tile = load_tile(y_desc, batch, head, y_start, CHUNK, rows.BLOCK_D)
    y_tile = tl.where(counts[:, None], y_tile, 0.0).to(y_tile.dtype)
    ones = tl.where(idx[None, :] < idx[:, None], 1.0, 0.0).to(y_tile.dtype)
    return dot(ones, y_tile, None, rows.FP32_PRECISION)
