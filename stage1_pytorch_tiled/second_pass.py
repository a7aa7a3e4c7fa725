"""More from the second pass: statistics of each row's weights, and reductions of your own; given, no task lies here."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .online_softmax import finite, nonzero
from .setting import FULL, Setting
from .tiled_forward import TileGrid, weight_tiles

Fold = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # acc, logits, weights, q_idx, k_idx → acc


class RowStats(NamedTuple):
    """How each query spreads its attention: fp32 (fp64 for fp64 inputs), 0 where a row sees no key."""

    entropy: Tensor  # [B, Hq, M], -Σ_j p·ln p over the keys, in nats
    max_weight: Tensor  # [B, Hq, M]
    mean_distance: Tensor  # [B, Hq, M], Σ_j p·|i + N - M - j| / Σ_j p


def tiled_row_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    setting: Setting = FULL,
    *,
    block_m: int = 16,
    block_n: int = 16,
) -> RowStats:
    """Compute statistics of each row's softmax weights, in a second pass over the tiles.

    Args:
        q, k, setting, block_m, block_n: as in the first pass, 4-D; its sinks are in the lse.
        lse: [B, Hq, M], from `tiled_attention` on the same inputs.

    Returns:
        A RowStats. With a sink the weights of a row add up to less than 1, and its entropy is that of the keys alone.
    """
    grid = TileGrid(q, k, setting, block_m=block_m, block_n=block_n)
    row_lse = finite(lse).unflatten(1, grid.q.shape[1:3])[..., None]  # [B, Hk, G, M, 1]
    entropy, max_weight, distance_sum, weight_sum = lse.new_zeros(4, *grid.q.shape[:-1])  # [B, Hk, G, M] each
    for tile, weights in weight_tiles(grid, lse):
        rows = tile.q_rows
        surprise = (row_lse[..., rows, :] - tile.logits).clamp(min=0)  # -ln P = L - S, below 0 only by rounding
        entropy[..., rows] += (weights * surprise).masked_fill(weights == 0, 0).sum(-1)  # 0·∞ is NaN, 0·ln 0 is 0
        max_weight[..., rows] = torch.maximum(max_weight[..., rows], weights.amax(-1))
        q_idx, k_idx = grid.positions(tile.q_rows, tile.k_cols)
        distance = (q_idx + (grid.n_k - grid.n_q) - k_idx).abs()
        distance_sum[..., rows] += (weights * distance).sum(-1)
        weight_sum[..., rows] += weights.sum(-1)
    mean_distance = distance_sum / nonzero(weight_sum)
    return RowStats(*(x.flatten(1, 2) for x in (entropy, max_weight, mean_distance)))


def fold_rows(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    setting: Setting,
    fold: Fold,
    start: float,
    *,
    block_m: int = 16,
    block_n: int = 16,
) -> Tensor:
    """Reduce logits and weights over the keys of each query, by a function that takes a tile at a time.

    Args:
        q, k, lse, setting, block_m, block_n: as in `tiled_row_stats`.
        fold: called as fold(acc, logits, weights, q_idx, k_idx), returns the acc after the tile. acc is [..., R];
            logits (sm_scale·q·kᵀ before softcap, -inf where not visible) and weights (0 there) are [..., R, C], all
            fp32 (fp64 for fp64 inputs); positions are int64, q_idx [R, 1] and k_idx [1, C]. R are queries, and the C
            keys are to be reduced. Tiles in which nothing is visible may be left out.
        start: what acc is before the first tile.

    Returns:
        [B, Hq, M], acc after the last tile; `start` for rows that no tile touched.
    """
    grid = TileGrid(q, k, setting, block_m=block_m, block_n=block_n)
    acc = lse.new_full(grid.q.shape[:-1], start)  # [B, Hk, G, M]
    for q_rows, _, *tile in _fold_tiles(grid, lse):
        acc[..., q_rows] = fold(acc[..., q_rows], *tile)
    return acc.flatten(1, 2)


def fold_cols(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    setting: Setting,
    fold: Fold,
    start: float,
    *,
    block_m: int = 16,
    block_n: int = 16,
) -> Tensor:
    """Reduce logits and weights over the queries of each key and the head group: `fold_rows` on transposed tiles.

    Args:
        q, k, lse, setting, block_m, block_n: as in `tiled_row_stats`.
        fold, start: as in `fold_rows`, but R are keys, and the C queries are to be reduced: q_idx is [1, C] and k_idx
            [R, 1]. Called for one query head of the group after the other, on the same acc.

    Returns:
        [B, Hk, N], acc after the last tile; `start` for keys that no tile touched.
    """
    grid = TileGrid(q, k, setting, block_m=block_m, block_n=block_n)
    acc = lse.new_full(k.shape[:3], start)  # [B, Hk, N]
    for _, k_cols, logits, weights, q_idx, k_idx in _fold_tiles(grid, lse):
        for head in range(grid.q.shape[2]):
            tile = (x.mT for x in (logits[:, :, head], weights[:, :, head], q_idx, k_idx))
            acc[..., k_cols] = fold(acc[..., k_cols], *tile)
    return acc


def _fold_tiles(grid: TileGrid, lse: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield (q_rows, k_cols, logits before softcap, weights, q_idx, k_idx) of every visible tile."""
    for tile, weights in weight_tiles(grid, lse):
        logits = tile.scores if tile.visible is None else tile.scores.masked_fill(~tile.visible, -math.inf)
        yield tile.q_rows, tile.k_cols, logits, weights, *grid.positions(tile.q_rows, tile.k_cols)
