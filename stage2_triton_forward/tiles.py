"""What happens to one tile: load, store, who sees whom, and the online softmax step. Shared by every kernel."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc=None):
    """Multiply two tiles with fp32 accumulation, and without TF32 for fp32 inputs."""
    if INTERPRETED:  # NumPy has no bf16; its products are exact in fp32, as on the tensor cores
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(desc, batch, head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows `start … start + BLOCK` of one head as [BLOCK, BLOCK_D]; rows and columns past the end are 0."""
    return desc.load([batch, head, start, 0]).reshape(BLOCK, BLOCK_D)


@triton.jit
def store_tile(desc, tile, batch, head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [BLOCK, BLOCK_D] as rows `start … start + BLOCK` of one head; rows and columns past the end are dropped."""
    desc.store([batch, head, start, 0], tile.to(desc.dtype).reshape(1, 1, BLOCK, BLOCK_D))


@triton.jit
def visible_tile(q_idx, k_idx, n_q, n_k, IS_CAUSAL: tl.constexpr):
    """Return [BLOCK_M, BLOCK_N], True where a query sees a key; causal is aligned to the bottom-right corner."""
    visible = (q_idx[:, None] < n_q) & (k_idx[None, :] < n_k)
    if IS_CAUSAL:
        visible = visible & (k_idx[None, :] <= q_idx[:, None] + n_k - n_q)
    return visible


@triton.jit
def online_softmax_step(row_max, row_sum, logits_log2):
    """Take a tile of base-2 logits [BLOCK_M, BLOCK_N] (-inf where masked) into the running max and sum.

    Returns the new max, the new sum, the weights relative to the new max, and the factor that rescales the old output.
    Source: FlashAttention-2 (Dao 2023), Algorithm 1, lines 9-10, with 2^x for e^x.
    """
    new_max = tl.maximum(row_max, tl.max(logits_log2, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits_log2 - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    return new_max, row_sum * rescale + tl.sum(weights, 1), weights, rescale


@triton.jit
def keep_tile(seed, drop_threshold, batch_head, q_idx, k_idx):
    """Return [BLOCK_M, BLOCK_N], True where dropout keeps a weight: Philox of the seed and the position alone."""
    columns = tl.broadcast_to(k_idx[None, :], [q_idx.shape[0], k_idx.shape[0]]).to(tl.uint32)
    rows = tl.broadcast_to(q_idx[:, None], [q_idx.shape[0], k_idx.shape[0]]).to(tl.uint32)
    heads = tl.full([q_idx.shape[0], k_idx.shape[0]], 0, tl.uint32) + batch_head.to(tl.uint32)
    random, _, _, _ = tl.philox(seed, columns, rows, heads, tl.zeros_like(columns))
    return random.to(tl.uint64) >= drop_threshold.to(tl.uint64)
