"""Hooks for the forward loop (`ON_LOGITS`): what to do with a tile of logits before the softmax consumes it."""

import triton
import triton.language as tl


@triton.jit
def store_logits(hook_args, logits, visible, q_idx, k_idx, batch_head):
    """Store the visible logits of a tile; `hook_args` is (scores_ptr to a zeroed [B·Hq, M, N], M, N)."""
    scores_ptr, n_q, n_k = hook_args
    head_ptr = scores_ptr + batch_head.to(tl.int64) * n_q * n_k  # 64-bit: B·Hq·M·N passes 2³¹ elements
    offsets = q_idx[:, None].to(tl.int64) * n_k + k_idx[None, :]
    tl.store(head_ptr + offsets, logits.to(scores_ptr.dtype.element_ty), mask=visible)
