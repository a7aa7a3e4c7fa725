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
    out = load_tile(out_desc, batch, head, q_start, BLOCK_M, BLOCK_DV).to(tl.float32)
    grad_out = load_tile(grad_out_desc, batch, head, q_start, BLOCK_M, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * grad_out, 1)  # D = rowsum(dO ∘ O)
    row = tl.program_id(1).to(tl.int64) * n_q
    if HAS_EXTRA:
        delta += tl.load(extra_ptr + row + q_idx, mask=q_idx < n_q, other=0.0)
    tl.store(delta_ptr + row + q_idx, delta, mask=q_idx < n_q)
