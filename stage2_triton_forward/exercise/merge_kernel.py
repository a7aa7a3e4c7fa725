"""Merges what several programs learnt about the same rows from different keys."""

import triton
import triton.language as tl

from .forward_kernel import add_sink
from .tiles import LN_2, LOG2_E


@triton.jit
def merge_kernel(
    partial_out_ptr,  # [splits, rows, Dv]
    partial_lse_ptr,  # [splits, rows]
    sinks_ptr,  # [Hq]
    out_ptr,  # [rows, Dv]
    lse_ptr,  # [rows]
    n_rows,
    n_q,
    N_HEADS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Merge one row of the output: the lse of each part says how much of the row's total weight it holds.

    Grid: (batch·heads·queries,). Source: Milakov and Gimelshein 2018, eq. 4; flash decoding (Dao et al. 2023).
    """
    row = tl.program_id(0).to(tl.int64)
    s_idx = tl.arange(0, BLOCK_S)
    d_idx = tl.arange(0, BLOCK_DV)
    is_split = s_idx < N_SPLITS
    part_rows = s_idx.to(tl.int64) * n_rows + row
    part_lse = tl.load(partial_lse_ptr + part_rows, mask=is_split, other=float("-inf"))  # [BLOCK_S]
    tl.static_assert(False, "Task 2.9: step 1: the lse of the whole row, -inf where no part saw a key")
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + row // n_q % N_HEADS).to(tl.float32)
        _, above = add_sink(1.0, (lse - shift) * LOG2_E, (sink - shift) * LOG2_E)  # relative to `shift`: small numbers
        lse = shift + above * LN_2
    tl.static_assert(False, "Task 2.9: step 2: the share of each part; below, the parts added up")
    parts = tl.load(
        partial_out_ptr + part_rows[:, None] * HEAD_DIM_V + d_idx[None, :],
        mask=is_split[:, None] & (d_idx < HEAD_DIM_V)[None, :],
        other=0.0,
    )  # [BLOCK_S, BLOCK_DV]
    tl.store(out_ptr + row * HEAD_DIM_V + d_idx, output.to(out_ptr.dtype.element_ty), mask=d_idx < HEAD_DIM_V)
    tl.store(lse_ptr + row, lse)
