"""Tiled PyTorch, in O(N) memory, with the face of `backend.Backend`: what CPU tensors run."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from stage1_pytorch_tiled import second_pass
from stage1_pytorch_tiled.hooks import AddColSum, AddRowSum, StoreScores
from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.tiled_forward import OnLogits, TileGrid, blocks, tiled_attention, tiled_softmax_col_sum
from stage4_backward import statistics
from stage4_backward.differentiable import differentiable, needs_gradients
from stage4_backward.recompute_pytorch import recompute_backward
from stage4_backward.statistics import Statistic

from .backend import Room
from .validation import check_fold_arguments

_TILES: dict[str, Any] = {"block_m": 128, "block_n": 512}  # large enough to keep PyTorch busy, and still O(N)


def attention(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, ...]:
    """Return output and lse."""
    return _run(statistics.PLAIN, _attend, q, k, v, setting)


def attention_with_scores(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, ...]:
    """Return output, lse and scores."""

    def attend(q, k, v, setting):
        keep = StoreScores(q, k)
        return *_attend(q, k, v, setting, keep), keep.scores

    return _run(statistics.SCORES, attend, q, k, v, setting)


def attention_with_row_sum(q: Tensor, k: Tensor, v: Tensor, setting: Setting, *, algorithm: str) -> tuple[Tensor, ...]:
    """Return output, lse and raw row sums; there is one algorithm, the loop."""

    def attend(q, k, v, setting, algorithm):
        rows = AddRowSum(q, k)
        return *_attend(q, k, v, setting, rows), rows.row_sum

    return _run(statistics.ROW_SUM, attend, q, k, v, setting, algorithm=algorithm)


def attention_with_col_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    *,
    algorithm: str,
    q_begin: int = 0,
    k_stop: int | None = None,
    room: Room | None = None,
) -> tuple[Tensor, ...]:
    """Return output, lse and raw column sums of a region; there is one algorithm, the loop."""

    def attend(q, k, v, setting, algorithm, q_begin, k_stop):
        columns = AddColSum(q, k, q_begin, k_stop)
        return *_attend(q, k, v, setting, columns), columns.col_sum

    own = {"algorithm": algorithm, "q_begin": q_begin, "k_stop": k_stop}
    return _into(room, _run(statistics.COL_SUM, attend, q, k, v, setting, **own))


def attention_with_softmax_col_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    *,
    q_begin: int = 0,
    q_stop: int | None = None,
    k_stop: int | None = None,
    per_query_head: bool = False,
    buffered: bool = False,
    room: Room | None = None,
) -> tuple[Tensor, ...]:
    """Return output, lse and softmax column sums of a region; nothing is ever buffered here."""

    def attend(q, k, v, setting, **region):
        output, lse = _attend(q, k, v, setting)
        return output, lse, tiled_softmax_col_sum(q, k, lse, setting, **region, **_TILES)

    region: dict[str, Any] = {"q_begin": q_begin, "q_stop": q_stop, "k_stop": k_stop, "per_query_head": per_query_head}
    return _into(room, _run(statistics.SOFTMAX_COL_SUM, attend, q, k, v, setting, **region))


def attention_with_stats(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, ...]:
    """Return output, lse, entropy, largest weight and mean distance."""

    def attend(q, k, v, setting):
        output, lse = _attend(q, k, v, setting)
        return output, lse, *second_pass.tiled_row_stats(q, k, lse, setting, **_TILES)

    return _run(statistics.STATS, attend, q, k, v, setting)


def compute_attention_scores(q: Tensor, k: Tensor, setting: Setting) -> Tensor:
    """Return the scores alone."""
    keep = StoreScores(q, k)
    grid = TileGrid(q, k, setting, **_TILES)
    for q_rows in blocks(q.shape[2], grid.block_m):
        for tile in grid.tiles_of(q_rows):
            keep(tile)
    if needs_gradients(q, k) and not keep.scores.requires_grad:
        return (grid.q[..., :0] @ grid.k[..., :0].mT).flatten(1, 2)  # no tile was visible: zeros that hang on q and k
    return keep.scores


def softmax_col_sum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    setting: Setting,
    *,
    q_begin: int = 0,
    q_stop: int | None = None,
    per_query_head: bool = False,
) -> Tensor:
    """Return softmax column sums alone."""
    region: dict[str, Any] = {"q_begin": q_begin, "q_stop": q_stop, "per_query_head": per_query_head}
    return tiled_softmax_col_sum(q, k, lse, setting, **region, **_TILES)


def fold_rows(q: Tensor, k: Tensor, lse: Tensor, setting: Setting, fold: Callable, start: float) -> Tensor:
    """Fold each query's logits and weights."""
    return second_pass.fold_rows(q, k, lse, setting, fold, start, **_TILES)


def fold_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    setting: Setting,
    fold: Callable,
    start: float,
    *,
    per_query_head: bool = False,
) -> Tensor:
    """Fold each key's logits and weights."""
    if per_query_head:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return second_pass.fold_cols(q, k, lse, setting, fold, start, **_TILES)


def check_fold(name: str, fold) -> None:
    """Check a fold of the caller's: a plain function of tensors, with five arguments."""
    if getattr(fold, "fn", None) is not None or not callable(fold):
        raise TypeError(f"{name} must be a plain function of tensors for backend='pytorch', got {fold!r}")
    check_fold_arguments(name, fold)


def check_device(q: Tensor) -> None:
    """PyTorch runs anywhere."""


def _attend(
    q: Tensor, k: Tensor, v: Tensor, setting: Setting, on_logits: OnLogits | None = None
) -> tuple[Tensor, Tensor]:
    return tiled_attention(q, k, v, setting, on_logits=on_logits, **_TILES)


def _run(
    statistic: Statistic,
    attend: Callable[..., tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    **own,
) -> tuple[Tensor, ...]:
    """Run a function of attention, and remember how to differentiate it where that is wanted."""
    call = partial(attend, q, k, v, setting, **own)
    if needs_gradients(q, k, v, setting.sinks):
        return differentiable(call, recompute_backward, statistic, q, k, v, setting, own)
    return call()


def _into(room: Room | None, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy results to where the caller wants them."""
    if room is None:
        return results
    output, lse, sums = results
    return tuple(x if to is None else to.copy_(x) for to, x in ((room.output, output), (None, lse), (room.sums, sums)))
