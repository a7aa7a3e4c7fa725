"""Attention with statistics of its rows, and with reductions of your own."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import pytorch_backend
from .problem import checked_problem, kernels
from .validation import check_flag, check_fold, check_number


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
    seed: int | None = None,
    backend: str | None = None,
    **options,
) -> AttentionStats:
    """Compute attention and, of each query, entropy, largest weight and mean distance, in one pass over the tiles.

    Args:
        q, k, v and the others, with the options window, softcap, sinks and key_padding_mask: as in `attention`.

    Returns:
        AttentionStats. Statistics are of the weights before dropout; with a sink these add up to less than 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range; the message names it.
    """
    problem = checked_problem(q, k, v, causal, sm_scale, dropout_p, seed, backend, **options)
    return AttentionStats(*problem.run("attention_with_stats"))


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
    seed: int | None = None,
    backend: str | None = None,
    **options,
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
        q, k, v and the others, with the options window, softcap, sinks and key_padding_mask: as in `attention`.
        row, col: `@triton.jit` functions (backend="pytorch": plain functions of tensors), or None.
        row_start, col_start: what acc is before the first tile.
        per_query_head: fold the columns of each query head apart, and not those of a head group into one.

    Returns:
        AttentionReduction(output, row, col). The output is differentiable, reductions are not.

    Raises:
        TypeError, ValueError: as in `attention_with_stats`; a fold is not jitted or does not take five arguments.
    """
    problem = checked_problem(q, k, v, causal, sm_scale, dropout_p, seed, backend, **options)
    check_flag("per_query_head", per_query_head)
    for name, fold, start in (("row", row, row_start), ("col", col, col_start)):
        check_number(f"{name}_start", start)
        if fold is not None:
            check_fold(name, fold, problem.backend)
    masks = {name: problem.options[name] for name in ("window", "softcap", "key_padding_mask")}
    arguments = (problem.causal, problem.sm_scale)
    output, lse = problem.attend()
    if problem.backend == "pytorch":
        fold_rows = fold_columns = pytorch_backend
    else:
        fold_rows, fold_columns = kernels("launch"), kernels("column_sums")
    rows = columns = None
    with torch.no_grad():
        if row is not None:
            rows = fold_rows.fold_rows(problem.q, problem.k, lse, row, row_start, *arguments, **masks)
        if col is not None:
            masks["per_query_head"] = per_query_head
            columns = fold_columns.fold_columns(problem.q, problem.k, lse, col, col_start, *arguments, **masks)
    return AttentionReduction(output, rows, columns)
