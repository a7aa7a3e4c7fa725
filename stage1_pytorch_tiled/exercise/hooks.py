"""Hooks for `tiled_attention`: scores and their sums out of the loop that already computes them."""

import torch
from torch import Tensor

from .tiled_forward import LogitsTile


class StoreScores:
    """Keeps every score; the only hook whose memory grows with M·N."""

    def __init__(self, q: Tensor, k: Tensor):
        """Make room for q [B, Hq, M, D] against k [B, Hk, N, D]; `scores` is [B, Hq, M, N] in q's dtype, masked 0."""
        self.scores = q.new_zeros(*q.shape[:3], k.shape[2])
        self._by_kv_head = self.scores.unflatten(1, (k.shape[1], -1))  # [B, Hk, G, M, N]

    def __call__(self, tile: LogitsTile) -> None:
        raise NotImplementedError("Task 1.9: write the tile's visible scores where they belong")


class AddRowSum:
    """Sums each query's scores over the keys it sees."""

    def __init__(self, q: Tensor, k: Tensor):
        """Make room for `row_sum` [B, Hq, M], fp32 (fp64 for fp64 inputs)."""
        self.row_sum = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        self._by_kv_head = self.row_sum.unflatten(1, (k.shape[1], -1))  # [B, Hk, G, M]

    def __call__(self, tile: LogitsTile) -> None:
        raise NotImplementedError("Task 1.10: add the tile's visible scores, summed over its keys")


class AddColSum:
    """Sums each key's scores over the queries that see it and over the head group."""

    def __init__(self, q: Tensor, k: Tensor, q_begin: int = 0, k_stop: int | None = None):
        """Make room for `col_sum` [B, Hk, k_stop], fp32 (fp64 for fp64 inputs): rows `q_begin:`, keys `:k_stop`."""
        self.q_begin = q_begin
        self.col_sum = k.new_zeros(k[:, :, :k_stop].shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))

    def __call__(self, tile: LogitsTile) -> None:
        skip = max(self.q_begin - tile.q_rows.start, 0)  # rows of the tile that lie before q_begin
        col_sum = self.col_sum[..., tile.k_cols]  # a view, cut off at k_stop
        raise NotImplementedError("Task 1.11: add the tile's visible scores, summed over queries and head group")


def visible_scores(tile: LogitsTile) -> Tensor:
    """Return the tile's scores with masked positions 0: -inf would poison a sum."""
    return tile.scores if tile.visible is None else tile.scores.masked_fill(~tile.visible, 0)
