"""A fold of the fuzzer's own: one that reads logits, and that masked ones must not disturb."""

import triton
import triton.language as tl


@triton.jit
def largest_logit(acc, logits, weights, q_idx, k_idx):
    """Fold: the largest raw score; masked logits are -inf."""
    return tl.maximum(acc, tl.max(logits, 1))
