"""Attention with statistics of its rows, and with reductions of your own."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.visibility import Window

from .problem import checked_problem
from .validation import check_flag, check_number


class AttentionStats(NamedTuple):
    """Attention, and how each query spreads it: statistics are fp32 (fp64 for fp64 inputs), 0 where it sees no key."""

    output: Tensor  # [B, Hq, M, Dv], q's dtype
    lse: Tensor  # [B, Hq, M], natural log, -inf where a row sees no key
    entropy: Tensor  # [B, Hq, M], -Σ_j p·ln p over the keys, in nats
    max_weight: Tensor  # [B, Hq, M], the largest weight
    mean_distance: Tensor  # [B, Hq, M], Σ_j p·|i + N - M - j| / Σ_j p, in tokens


class AttentionReduction(NamedTuple):
    """Attention, and what the caller's folds made of its rows and columns; None where there was no fold."""

    output: Tensor  # [B, Hq, M, Dv], q's dtype
    row: Tensor | None  # [B, Hq, M], fp32 (fp64 for fp64 inputs)
    col: Tensor | None  # [B, Hk, N], or [B, Hq, N] with per_query_head


def attention_with_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> AttentionStats:
    """Compute attention and, of each query, entropy, largest weight and mean distance, in one pass over the tiles.

    Args:
        q, k, v and the others: as in `attention`.

    Returns:
        AttentionStats. Statistics are of the weights before dropout; with a sink these add up to less than 1. Output,
        lse and entropy are differentiable, the largest weight and the mean distance are not: an error says so, but for
        torch.compile on the CPU, where they are constants.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range; the message names it.
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    return AttentionStats(*runs.attention_with_stats(q, k, v, setting))


def attention_with_reduction(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    row: Callable | None = None,
    col: Callable | None = None,
    row_start: float = 0.0,
    col_start: float = 0.0,
    per_query_head: bool = False,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> AttentionReduction:
    """Compute attention, and reduce its rows and columns by functions of your own, without ever holding the matrix.

    A fold takes one tile after another into an accumulator: `fold(acc, logits, weights, q_idx, k_idx)` returns the acc
    after the tile. acc is [R]; logits (sm_scale·q·kᵀ before softcap, -inf where masked) and weights (final, 0 where
    masked) are [R, C], fp32; the axis to reduce is the last one. For `row`, R are queries and q_idx is [R, 1], k_idx
    [1, C]; for `col` tiles come transposed: R are keys, k_idx [R, 1], q_idx [1, C]. So one fold can serve both:

        @triton.jit
        def largest_weight(acc, logits, weights, q_idx, k_idx):
            return tl.maximum(acc, tl.max(weights, 1))

    Tiles come in order, those that are masked altogether may be left out, and a fold must not mind masked elements.

    Args:
        q, k, v and the others: as in `attention`.
        row, col: `@triton.jit` functions (backend="pytorch": plain functions of tensors), or None.
        row_start, col_start: what acc is before the first tile.
        per_query_head: fold the columns of each query head apart, and not those of a head group into one.

    Returns:
        AttentionReduction(output, row, col). The output is differentiable, reductions are not.

    Raises:
        TypeError, ValueError: as in `attention_with_stats`; a fold is not jitted or does not take five arguments.
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    check_flag("per_query_head", per_query_head)
    for name, fold, start in (("row", row, row_start), ("col", col, col_start)):
        check_number(f"{name}_start", start)
        if fold is not None:
            runs.check_fold(name, fold)
    output, lse = runs.attention(q, k, v, setting)
    rows = columns = None
    with torch.no_grad():
        if row is not None:
            rows = runs.fold_rows(q, k, lse, setting, row, row_start)
        if col is not None:
            columns = runs.fold_columns(q, k, lse, setting, col, col_start, per_query_head=per_query_head)
    return AttentionReduction(output, rows, columns)
