"""Attention with sums of its scores: over rows, over columns, and from one part of the sequence to another.

q [B, Hq, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv], and the options window, softcap, sinks, key_padding_mask, seed and
backend are those of `attention` in all functions here. Raw sums add up sm_scale·q·kᵀ before softcap, softmax sums the
weights before dropout; what a mask hides adds nothing. Sums are fp32 (fp64 for fp64 inputs).
"""

from typing import Any

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.visibility import Window
from stage4_backward.differentiable import needs_gradients

from .backend import Room
from .problem import checked_problem
from .validation import check_buffer, check_choice, check_flag, check_split
from .workspace import buffer

ROW_SUM_ALGORITHMS = ("auto", "linear", "kahan")
COL_SUM_ALGORITHMS = ("linear", "atomic_reverse", "atomic_round_robin")


def attention_with_row_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    algorithm: str = "auto",
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and, of each query, the sum of its raw scores.

    Args:
        algorithm: "linear" adds up the keys before it multiplies, in O(N·D); "kahan" adds up scores inside of the
            attention loop, with compensated summation; "auto" takes the faster one for the lengths given. The PyTorch
            backend has one algorithm, its loop.
        others: see the module.

    Returns:
        output [B, Hq, M, Dv] in q's dtype, and row sums [B, Hq, M]; 0 for a row that sees no key.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range; the message names it.
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    check_choice("algorithm", algorithm, ROW_SUM_ALGORITHMS)
    output, _, row_sum = runs.attention_with_row_sum(q, k, v, setting, algorithm=algorithm)
    return output, row_sum


def attention_with_col_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    algorithm: str = "linear",
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and, of each key, the sum of its raw scores over queries and over the head group.

    Args:
        algorithm: "linear" adds up the queries before it multiplies, in O(N·D). "atomic_reverse" and
            "atomic_round_robin" add up scores inside of the attention loop by atomic additions, whose order, and with
            it the last bits, may change from run to run; the names say in which order keys are visited. The PyTorch
            backend has one algorithm, its loop.
        others: see the module.

    Returns:
        output [B, Hq, M, Dv] in q's dtype, and column sums [B, Hk, N].

    Raises:
        TypeError, ValueError: as in `attention_with_row_sum`.
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    check_choice("algorithm", algorithm, COL_SUM_ALGORITHMS)
    output, _, col_sum = runs.attention_with_col_sum(q, k, v, setting, algorithm=algorithm)
    return output, col_sum


def attention_with_col_sum_sequential(
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
) -> tuple[Tensor, Tensor]:
    """Compute `attention_with_col_sum` with algorithm="atomic_round_robin": the same sums, atomically."""
    return attention_with_col_sum(
        *(q, k, v, causal, sm_scale, dropout_p),
        algorithm="atomic_round_robin",
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_padding_mask=key_padding_mask,
        seed=seed,
        backend=backend,
    )


def attention_with_softmax_col_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    q_begin: int = 0,
    q_stop: int | None = None,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and the attention that each key gets, over queries and over the head group.

    Two passes: a weight needs its row's final normaliser, which only the first pass knows.

    Args:
        q_begin, q_stop: count the queries from q_begin to q_stop only (None: to the last); the last w for M - w.
        others: see the module.

    Returns:
        output [B, Hq, M, Dv] in q's dtype, and softmax column sums [B, Hk, N]. Over all queries those of a key head add
        up to the number of rows that see a key (less what sinks take).

    Raises:
        TypeError, ValueError: as in `attention_with_row_sum`.

    Source: H2O (Zhang et al. 2023) and SnapKV (Li et al. 2024) choose what to keep by such sums.
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    q_stop = q.shape[2] if q_stop is None else q_stop
    if any(isinstance(x, bool) or not isinstance(x, int) for x in (q_begin, q_stop)):
        raise TypeError(f"q_begin and q_stop must be ints, got {q_begin!r} and {q_stop!r}")
    if not 0 <= q_begin <= q_stop <= q.shape[2]:
        raise ValueError(
            f"q_begin and q_stop must be 0 <= q_begin <= q_stop <= {q.shape[2]}, got {q_begin} and {q_stop}"
        )
    output, _, col_sum = runs.attention_with_softmax_col_sum(q, k, v, setting, q_begin=q_begin, q_stop=q_stop)
    return output, col_sum


def attention_cross_token_qk_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: int,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    algorithm: str = "linear",
    out: Tensor | None = None,
    cross_token_qk_out: Tensor | None = None,
    reuse_buffers: bool = False,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and, of each key before `split`, the sum of its raw scores with the queries from `split` on.

    Args:
        split: where to cut, in [0, N]; 0 gives an empty sum.
        algorithm: as in `attention_with_col_sum`.
        out: [B, Hq, M, Dv] in q's dtype, contiguous, where the output goes.
        cross_token_qk_out: [B, Hk, split] fp32 (fp64 for fp64 inputs), contiguous, where the sums go.
        reuse_buffers: return tensors from a workspace, which the next call with the same shapes on the same stream
            overwrites; within a CUDA graph they are the graph's own.
        others: see the module.

    Returns:
        output [B, Hq, M, Dv] in q's dtype, and sums [B, Hk, split].

    Raises:
        TypeError, ValueError: as in `attention_with_row_sum`; a buffer is of the wrong kind or overlaps an input.
    """
    check_choice("algorithm", algorithm, COL_SUM_ALGORITHMS)
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    given = {"out": out, "cross_token_qk_out": cross_token_qk_out}
    room = _cross_token_room("qk", q, k, v, setting, split, given, reuse_buffers)
    output, _, sums = runs.attention_with_col_sum(q, k, v, setting, algorithm=algorithm, **_region(q, split), room=room)
    return output, sums


def attention_cross_token_softmax_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: int,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    out: Tensor | None = None,
    cross_token_softmax_out: Tensor | None = None,
    reuse_buffers: bool = False,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and the attention that each key before `split` gets from the queries from `split` on.

    Weights are normalised over the whole row, keys from `split` on included.

    Args:
        cross_token_softmax_out: [B, Hk, split] fp32 (fp64 for fp64 inputs), contiguous, where the sums go.
        others: as in `attention_cross_token_qk_sum`.

    Returns:
        output [B, Hq, M, Dv] in q's dtype, and sums [B, Hk, split].

    Raises:
        TypeError, ValueError: as in `attention_cross_token_qk_sum`.
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    given = {"out": out, "cross_token_softmax_out": cross_token_softmax_out}
    room = _cross_token_room("softmax", q, k, v, setting, split, given, reuse_buffers)
    output, _, sums = runs.attention_with_softmax_col_sum(q, k, v, setting, **_region(q, split), room=room)
    return output, sums


def attention_cross_token_softmax_sum_buffered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: int,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    out: Tensor | None = None,
    cross_token_softmax_out: Tensor | None = None,
    reuse_buffers: bool = False,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `attention_cross_token_softmax_sum`, keeping the region's scores between its two passes.

    It needs (M - split)·split elements for each query head, and is there for comparison: computing the scores twice
    costs less than writing and reading them. They are kept in q's dtype, so that in fp16 and bf16 each weight, and with
    it the sum, is off by the rounding of its score. The PyTorch backend keeps nothing.
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    given = {"out": out, "cross_token_softmax_out": cross_token_softmax_out}
    room = _cross_token_room("softmax", q, k, v, setting, split, given, reuse_buffers)
    output, _, sums = runs.attention_with_softmax_col_sum(
        q, k, v, setting, **_region(q, split), buffered=True, room=room
    )
    return output, sums


def _region(q: Tensor, split: int) -> dict[str, Any]:
    """Return the queries from `split` on and the keys before it, as the backends take them."""
    return {"q_begin": min(split, q.shape[2]), "k_stop": split}


def _cross_token_room(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    split: int,
    given: dict[str, Tensor | None],
    reuse_buffers: bool,
) -> Room | None:
    """Check what cross-token sums are given beside attention; return room for output and sums, if any is given.

    Args:
        name: of the buffers that are reused.
        given: the caller's buffers for output and sums, by the names of the arguments.
    """
    check_split(split, k.shape[2])
    check_flag("reuse_buffers", reuse_buffers)
    if not reuse_buffers and not any(x is not None for x in given.values()):
        return None
    wide = torch.promote_types(q.dtype, torch.float32)
    shapes = [((*q.shape[:3], v.shape[3]), q.dtype), ((*k.shape[:2], split), wide)]
    taken = {"q": q, "k": k, "v": v}
    for (argument, x), (shape, dtype) in zip(given.items(), shapes, strict=True):
        if x is not None:
            check_buffer(argument, x, shape, dtype, taken)
            taken[argument] = x
    if needs_gradients(q, k, v, setting.sinks):
        raise ValueError("buffers and reuse_buffers do not go with gradients: call under torch.no_grad()")
    output, sums = (
        buffer(f"{name} {argument}", *kind, q.device) if x is None and reuse_buffers else x
        for (argument, x), kind in zip(given.items(), shapes, strict=True)
    )
    return Room(output, sums, reuse_buffers)
