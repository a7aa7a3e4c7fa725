"""Softmax in three passes, in two, and in blocks that can be merged: the idea that FlashAttention rests on."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def softmax_three_pass(logits: Tensor) -> Tensor:
    """Safe softmax over the last dimension: one pass for the max, one for the sum, one for the result.

    Args:
        logits: [..., N] floating; -inf stands for a masked position.

    Returns:
        [..., N], the dtype of logits; a row of only -inf gives zeros.

    Source: Milakov and Gimelshein 2018, Algorithm 2.
    """
    n_k = logits.shape[-1]
    row_max = logits.new_full(logits.shape[:-1], -math.inf)  # [...]
    raise NotImplementedError("Task 1.1: three loops over the keys: the max, the sum of e^(x - max), the weights")
    row_sum = torch.zeros_like(row_max)  # [...]
    weights = torch.zeros_like(logits)
    return weights


def softmax_two_pass(logits: Tensor) -> Tensor:
    """Online softmax over the last dimension: max and sum in one pass, the result in a second.

    The sum so far is relative to the max so far; when the max grows, the sum is rescaled.

    Args:
        logits: [..., N] floating; -inf stands for a masked position.

    Returns:
        [..., N], the dtype of logits; a row of only -inf gives zeros.

    Source: Milakov and Gimelshein 2018, Algorithm 3.
    """
    n_k = logits.shape[-1]
    row_max = logits.new_full(logits.shape[:-1], -math.inf)  # [...]
    row_sum = torch.zeros_like(row_max)  # [...]
    raise NotImplementedError("Task 1.2: one loop: when the max grows, rescale the sum so far, then add the new term")

    return torch.exp(logits - finite(row_max)[..., None]) / nonzero(row_sum)[..., None]


class SoftmaxState(NamedTuple):
    """What is known of a set of rows after some of their keys: enough to go on, or to merge with another part."""

    row_max: Tensor  # [..., M], largest logit so far, -inf before the first visible key
    row_sum: Tensor  # [..., M], Σ e^{logit - row_max}
    acc: Tensor  # [..., M, Dv], Σ e^{logit - row_max}·v, not yet divided by row_sum


def empty_state(rows_shape: tuple[int, ...], head_dim_v: int, like: Tensor) -> SoftmaxState:
    """Return the state of rows that have seen no key: the neutral element of `merge`."""
    return SoftmaxState(
        row_max=like.new_full(rows_shape, -math.inf),
        row_sum=like.new_zeros(rows_shape),
        acc=like.new_zeros(*rows_shape, head_dim_v),
    )


def online_softmax_step(
    state: SoftmaxState, logits: Tensor, v_tile: Tensor, weight_factor: Tensor | None = None
) -> SoftmaxState:
    """Take one more tile of keys and values into the state.

    Args:
        state: the rows so far.
        logits: [..., M, n], scaled, -inf where masked.
        v_tile: [..., n, Dv].
        weight_factor: [..., M, n] or None, multiplies the weights for the output alone (dropout).

    Returns:
        The state after the tile.

    Source: FlashAttention-2 (Dao 2023), Algorithm 1, lines 9-10.
    """
    raise NotImplementedError("Task 1.4: rescale the old state to the new max, then add the tile (FA2 Alg. 1, l. 9-10)")


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """Merge the states of the same rows over two disjoint sets of keys; associative and commutative.

    Source: Milakov and Gimelshein 2018, eq. 4 (the ⊕ of parallel online softmax), with the output carried along.
    """
    raise NotImplementedError("Task 1.3: rescale both parts to their common max, then add them")


def finish(state: SoftmaxState, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Divide by the normaliser, once, at the end.

    Args:
        state: the rows after all their keys.
        sink: broadcastable to [..., M] or None, one extra logit that only enlarges the denominator.

    Returns:
        output [..., M, Dv] (0 where a row saw no key) and lse [..., M] (natural log; -inf there).

    Source: FlashAttention-2, Algorithm 1, lines 12-13.
    """
    raise NotImplementedError("Task 1.5: O = acc / l and L = m + log(l), then let the sink into the denominator")


def finite(row_max: Tensor) -> Tensor:
    """Replace a max of -inf (no key seen yet) by 0, so that -inf - max stays -inf and never becomes NaN."""
    return row_max.masked_fill(torch.isneginf(row_max), 0)


def nonzero(row_sum: Tensor) -> Tensor:
    """Replace a sum of 0 (no key seen) by 1, so that 0 / sum is 0."""
    return row_sum.masked_fill(row_sum == 0, 1)
