"""What happens to one tile: load, store, who sees whom, and the online softmax step. Shared by every kernel."""

from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
IEEE = tl.constexpr("ieee")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Mask(NamedTuple):
    """Who sees whom: query i sees real key j < n_k iff -right <= i + offset - j <= left. Capitals are constexpr."""

    n_q: int
    n_k: int
    offset: int  # n_k - n_q: query i stands at key i + offset, the last query at the last key
    left: int
    right: int
    padding_ptr: tl.tensor  # [B, n_k], nonzero for a real key
    HAS_LEFT: tl.constexpr
    HAS_RIGHT: tl.constexpr
    HAS_PADDING: tl.constexpr


class Dropout(NamedTuple):
    """Which weights are dropped (a random word below `threshold`), and what the kept ones are multiplied by."""

    seed: int
    threshold: int
    keep_scale: float
    ENABLED: tl.constexpr


class SoftmaxState(NamedTuple):
    """What is known of a tile of rows after some of their keys."""

    row_max: tl.tensor  # [BLOCK_M], base 2, -inf before the first visible key
    row_sum: tl.tensor  # [BLOCK_M]
    acc: tl.tensor  # [BLOCK_M, BLOCK_DV]


@triton.jit
def dot(a, b, acc=None, FP32_PRECISION: tl.constexpr = IEEE):
    """Multiply two tiles with fp32 accumulation; fp32 inputs never fall to plain TF32."""
    if INTERPRETED:  # NumPy has no bf16; its products are exact in fp32, as on the tensor cores
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=FP32_PRECISION)


@triton.jit
def load_tile(desc, batch, head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows `start … start + BLOCK` of one head as [BLOCK, BLOCK_D]; rows and columns past the end are 0."""
    return desc.load([batch, head, start, 0]).reshape(BLOCK, BLOCK_D)


@triton.jit
def store_tile(desc, tile, batch, head, start, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [BLOCK, BLOCK_D] as rows `start … start + BLOCK` of one head; rows and columns past the end are dropped."""
    desc.store([batch, head, start, 0], tile.to(desc.dtype).reshape(1, 1, BLOCK, BLOCK_D))


@triton.jit
def real_keys(padding_ptr, n_k, batch, k_idx):
    """Return which keys are real, by the padding mask [B, n_k]; none is before the first key or past the last."""
    inside = (k_idx >= 0) & (k_idx < n_k)
    return tl.load(padding_ptr + batch.to(tl.int64) * n_k + k_idx, mask=inside, other=0) != 0


@triton.jit
def visible_tile(mask, batch, q_idx, k_idx):
    """Return [BLOCK_M, BLOCK_N], True where a query sees a key; rows past the last query are not told apart."""
    position = q_idx[:, None] + mask.offset
    if mask.HAS_RIGHT:
        visible = k_idx[None, :] <= tl.minimum(position + mask.right, mask.n_k - 1)
    else:
        visible = (k_idx < mask.n_k)[None, :] & (q_idx >= 0)[:, None]
    if mask.HAS_LEFT:
        visible = visible & (k_idx[None, :] >= q_idx[:, None] + (mask.offset - mask.left))  # takes fewer registers
    if mask.HAS_PADDING:
        visible = visible & real_keys(mask.padding_ptr, mask.n_k, batch, k_idx)[None, :]
    return visible


@triton.jit
def visible_keys(mask, q_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the key positions (begin, whole_begin, whole_stop, stop) for the query tile that starts at q_start.

    No row of the tile sees a key before `begin` or from `stop` on; every row sees every key of the inner range, whose
    ends, like `begin`, are multiples of BLOCK_N. (Key padding is not considered.)
    """
    first_position = q_start + mask.offset
    last_position = tl.minimum(q_start + BLOCK_M, mask.n_q) - 1 + mask.offset
    begin = 0
    whole_begin = 0
    whole_stop = mask.n_k // BLOCK_N * BLOCK_N
    stop = mask.n_k
    if mask.HAS_RIGHT:
        stop = tl.minimum(stop, tl.maximum(last_position + mask.right + 1, 0))
        whole_stop = tl.minimum(whole_stop, tl.maximum(first_position + mask.right + 1, 0) // BLOCK_N * BLOCK_N)
    if mask.HAS_LEFT:
        begin = tl.maximum(first_position - mask.left, 0) // BLOCK_N * BLOCK_N
        whole_begin = tl.cdiv(tl.maximum(last_position - mask.left, 0), BLOCK_N) * BLOCK_N
        whole_stop = tl.maximum(whole_stop, whole_begin)
    return begin, whole_begin, whole_stop, stop


@triton.jit
def online_softmax_step(state, logits, scale_log2):
    """Take a tile of unscaled logits [BLOCK_M, BLOCK_N] (-inf where masked) into the running max and sum.

    With scale_log2 = scale·log2(e) > 0, `2^(logits·scale_log2 - max)` is one fused multiply-add and one exp2 each.
    Returns the state with its output rescaled to the new max, and the weights relative to it.
    Source: FlashAttention-2 (Dao 2023), Algorithm 1, lines 9-10, with 2^x for e^x.
    """
    new_max = tl.maximum(state.row_max, tl.max(logits, 1) * scale_log2)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row with no key so far: -inf - (-inf) is NaN
    weights = tl.exp2(logits * scale_log2 - shift[:, None])
    rescale = tl.exp2(state.row_max - shift)
    row_sum = state.row_sum * rescale + tl.sum(weights, 1)
    return SoftmaxState(new_max, row_sum, state.acc * rescale[:, None]), weights


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent to fp32 accuracy: a series near 0, where 1 - e^-2x would cancel."""
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - decay) / (1 + decay)
    squared = x * x
    near = x * (1 + squared * (-0.33333333 + squared * (0.13333333 + squared * (-0.053968254 + squared * 0.021869488))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def drop_tile(dropout, weights, batch_head, q_idx, k_idx):
    """Return the weights [BLOCK_M, BLOCK_N] with dropped ones 0 and kept ones scaled up.

    What is dropped is Philox of the seed and the position alone, so that the backward pass can drop the same.
    """
    columns = tl.broadcast_to(k_idx[None, :], weights.shape).to(tl.uint32)
    rows = tl.broadcast_to(q_idx[:, None], weights.shape).to(tl.uint32)
    heads = tl.full(weights.shape, 0, tl.uint32) + batch_head.to(tl.uint32)
    random, _, _, _ = tl.philox(dropout.seed, columns, rows, heads, tl.zeros_like(columns))
    keep = random.to(tl.uint64) >= dropout.threshold.to(tl.uint64)
    return tl.where(keep, weights * dropout.keep_scale, 0.0)
