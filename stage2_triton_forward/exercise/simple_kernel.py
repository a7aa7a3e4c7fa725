"""The teaching kernel: stage 1's loop, one program per query tile, with nothing clever in it."""

import triton
import triton.language as tl

from .tiles import dot


@triton.jit
def simple_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    n_q,
    n_k,
    sm_scale,
    N_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Attention of one query tile of one head against all its keys.

    Grid: (query tiles, batch·heads). Source: FlashAttention-2 (Dao 2023), Algorithm 1.
    """
    m_block = tl.program_id(0)
    batch = (tl.program_id(1) // N_HEADS).to(tl.int64)
    head = tl.program_id(1) % N_HEADS
    kv_head = head // GROUP

    d_idx = tl.arange(0, BLOCK_D)
    in_head_dim = d_idx < HEAD_DIM

    q_head = q_ptr + batch * q_strides[0] + head * q_strides[1]
    k_head = k_ptr + batch * k_strides[0] + kv_head * k_strides[1]
    v_head = v_ptr + batch * v_strides[0] + kv_head * v_strides[1]

    tl.static_assert(False, "Task 2.1: step 1: the positions of the queries, which of them exist, and their tile")

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for k_start in range(0, n_k, BLOCK_N):
        k_idx = k_start + tl.arange(0, BLOCK_N)
        tl.static_assert(False, "Task 2.1: step 2: tiles of k and v, the logits, and which keys exist")
        if IS_CAUSAL:
            tl.static_assert(False, "Task 2.2: a query sees the keys up to its own position")
        logits = tl.where(visible, logits, float("-inf"))

        tl.static_assert(False, "Task 2.1: step 3: the online softmax step, as in stage 1")

    tl.static_assert(False, "Task 2.1: step 4: the output and the lse; store both, masked")

    out_head = out_ptr + batch * out_strides[0] + head * out_strides[1]
    out_offsets = q_idx[:, None] * out_strides[2] + d_idx * out_strides[3]
