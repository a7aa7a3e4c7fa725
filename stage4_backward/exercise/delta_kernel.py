"""What every row of the backward pass subtracts: one number per query, computed before the two big kernels."""

import triton
import triton.language as tl

from stage2_triton_forward.tiles import load_tile


@triton.jit
def delta_kernel(
    out_desc,  # [B, Hq, M, Dv]
    grad_out_desc,  # [B, Hq, M, Dv]
    extra_ptr,  # [B, Hq, M], added
    delta_ptr,  # [B, Hq, M]
    n_q,
    N_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
):
    """Store delta_i = Σ_d dO_id·O_id, which equals Σ_j P_ij·dP_ij, plus whatever else hangs on the normaliser.

    Grid: (query tiles, batch·Hq). Source: FlashAttention-2 (Dao 2023), Algorithm 2, line 4; eq. 4 of FlashAttention.
    """
    q_start = tl.program_id(0) * BLOCK_M
    q_idx = q_start + tl.arange(0, BLOCK_M)
    batch = tl.program_id(1) // N_HEADS
    head = tl.program_id(1) % N_HEADS
    tl.static_assert(False, "Task 4.9: step 1: a tile of O, one of dO, and the row sums of their product")
    row = tl.program_id(1).to(tl.int64) * n_q
    if HAS_EXTRA:
        tl.static_assert(False, "Task 4.9: step 2: what else these rows subtract")
    tl.store(delta_ptr + row + q_idx, delta, mask=q_idx < n_q)
