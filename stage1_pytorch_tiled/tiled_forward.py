"""FlashAttention's forward pass as a loop over tiles, in PyTorch: no tensor ever has M×N elements."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.philox import keep_mask

from .online_softmax import empty_state, finish, finite, online_softmax_step
from .setting import FULL, Setting
from .visibility import visible_sides


class LogitsTile(NamedTuple):
    """One tile of the matrix that is never stored; hooks and the softmax both read it."""

    q_rows: slice
    k_cols: slice
    scores: Tensor  # [B, Hk, G, m, n], sm_scale·q·kᵀ, not masked
    logits: Tensor  # [B, Hk, G, m, n], after softcap, -inf where not visible
    visible: Tensor | None  # bool, broadcastable to the tile; None when every element is visible


OnLogits = Callable[[LogitsTile], None]


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting = FULL,
    *,
    block_m: int = 16,
    block_n: int = 16,
    on_logits: OnLogits | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention tile by tile with the online softmax.

    Args:
        q: [B, Hq, M, D] or [B, M, D], any floating dtype, any strides, any device.
        k: [B, Hk, N, D] or [B, N, D]; Hq is a multiple of Hk (grouped-query attention).
        v: [B, Hk, N, Dv] or [B, N, Dv].
        setting: mask, scale, dropout and the like.
        block_m: queries in a tile.
        block_n: keys in a tile.
        on_logits: called with every visited LogitsTile, before the softmax sees it.

    Returns:
        output, q's shape with v's last dimension, q's dtype; lse, q's shape without the last dimension, fp32 (fp64 for
        fp64 inputs), natural log. Rows that see no key: output 0, lse -inf.

    Source: FlashAttention-2 (Dao 2023), Algorithm 1.
    """
    squeeze = q.ndim == 3
    if squeeze:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    grid = TileGrid(q, k, setting, block_m=block_m, block_n=block_n)
    v = v.unsqueeze(2)  # [B, Hk, 1, N, Dv]
    wide = grid.wide
    batch, n_kv_heads, group, n_q, _ = grid.q.shape
    sink = None if setting.sinks is None else setting.sinks.to(wide).view(1, n_kv_heads, group, 1)

    output = q.new_empty(batch, n_kv_heads, group, n_q, v.shape[-1])
    lse = q.new_empty(batch, n_kv_heads, group, n_q, dtype=wide)
    for q_rows in blocks(n_q, block_m):
        rows_shape = (batch, n_kv_heads, group, q_rows.stop - q_rows.start)
        state = empty_state(rows_shape, v.shape[-1], like=lse)
        for tile in grid.tiles_of(q_rows):
            if on_logits is not None:
                on_logits(tile)
            factor = grid.dropout_factor(tile) if setting.dropout_p > 0 else None
            state = online_softmax_step(state, tile.logits, v[..., tile.k_cols, :].to(wide), factor)
        output_rows, lse_rows = finish(state, sink)
        output[..., q_rows, :] = output_rows.to(q.dtype)
        lse[..., q_rows] = lse_rows

    output, lse = output.flatten(1, 2), lse.flatten(1, 2)  # [B, Hq, M, Dv], [B, Hq, M]
    return (output.squeeze(1), lse.squeeze(1)) if squeeze else (output, lse)


def tiled_softmax_col_sum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    setting: Setting = FULL,
    *,
    block_m: int = 16,
    block_n: int = 16,
    q_begin: int = 0,
    q_stop: int | None = None,
    k_stop: int | None = None,
    per_query_head: bool = False,
) -> Tensor:
    """Sum each key's softmax weight over the queries, in a second pass over the tiles.

    One pass cannot do it: a weight needs its row's final normaliser, which the first pass returns as lse.

    Args:
        q, k, setting, block_m, block_n: as in the first pass; its sinks are in the lse.
        lse: [B, Hq, M] or [B, M], from `tiled_attention` on the same inputs.
        q_begin, q_stop, k_stop: sum query rows q_begin:q_stop, for keys :k_stop; None means all.
        per_query_head: do not sum over the head group.

    Returns:
        [B, Hk, k_stop] ([B, Hq, k_stop] if per_query_head) or [B, k_stop], fp32 (fp64 for fp64 inputs).
    """
    squeeze = q.ndim == 3
    if squeeze:
        q, k, lse = (x.unsqueeze(1) for x in (q, k, lse))
    grid = TileGrid(q, k, setting, block_m=block_m, block_n=block_n)
    col_sum = lse.new_zeros(*grid.q.shape[:3], k.shape[2] if k_stop is None else k_stop)  # [B, Hk, G, k_stop]
    for tile, weights in weight_tiles(grid, lse, q_begin, q_stop, k_stop):
        col_sum[..., tile.k_cols] += weights.sum(-2)
    col_sum = col_sum.flatten(1, 2) if per_query_head else col_sum.sum(2)
    return col_sum.squeeze(1) if squeeze else col_sum


def weight_tiles(
    grid: "TileGrid", lse: Tensor, q_begin: int = 0, q_stop: int | None = None, k_stop: int | None = None
) -> Iterator[tuple[LogitsTile, Tensor]]:
    """Walk the tiles a second time: yield each with its weights, which the lse makes final at once.

    Args:
        grid: the tiles of the first pass.
        lse: [B, Hq, M], from `tiled_attention` on the same inputs.
        q_begin, q_stop, k_stop: visit query rows q_begin:q_stop and keys :k_stop only; None means all.

    Returns:
        An iterator of (tile, weights [B, Hk, G, m, n]); weights are 0 where not visible.

    Source: FlashAttention-2 (Dao 2023), Algorithm 2, line 11.
    """
    lse = finite(lse).unflatten(1, grid.q.shape[1:3])  # [B, Hk, G, M]
    q_stop = grid.n_q if q_stop is None else q_stop
    for q_rows in blocks(q_stop, grid.block_m, q_begin):
        for tile in grid.tiles_of(q_rows, k_stop):
            weights = torch.exp(tile.logits - lse[..., q_rows, None])  # P = e^{S - L}
            yield tile, weights


class TileGrid:
    """Cuts the M×N matrix of logits into tiles, and yields the visible ones of a block of queries."""

    def __init__(self, q: Tensor, k: Tensor, setting: Setting = FULL, *, block_m: int = 16, block_n: int = 16):
        n_kv_heads = k.shape[1]
        self.q = q.unflatten(1, (n_kv_heads, q.shape[1] // n_kv_heads))  # [B, Hk, G, M, D]
        self.k = k.unsqueeze(2)  # [B, Hk, 1, N, D]
        self.setting = setting
        self.sm_scale = setting.scale(q.shape[-1])
        self.block_m, self.block_n = block_m, block_n
        self.n_q, self.n_k = q.shape[2], k.shape[2]
        sides = visible_sides(setting.causal, setting.window)
        self.left, self.right = (math.inf if side is None else side for side in sides)
        self.wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def tiles_of(self, q_rows: slice, k_stop: int | None = None) -> Iterator[LogitsTile]:
        """Yield the tiles of the query rows and of keys `:k_stop` that any of the rows can see, in key order."""
        q_tile = self.q[..., q_rows, :].to(self.wide)  # [B, Hk, G, m, D]
        for k_cols in blocks(self.n_k if k_stop is None else k_stop, self.block_n):
            seen = self.visibility(q_rows, k_cols)
            if seen is False:
                continue
            k_tile = self.k[..., k_cols, :].to(self.wide)  # [B, Hk, 1, n, D]
            scores = q_tile @ k_tile.transpose(-1, -2) * self.sm_scale  # S_ij = s·q_i·k_jᵀ
            softcap = self.setting.softcap
            logits = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            visible = None if seen is True else seen
            if self.setting.key_padding_mask is not None:
                real = self.setting.key_padding_mask[:, None, None, None, k_cols]
                visible = real if visible is None else visible & real
            if visible is not None:
                logits = logits.masked_fill(~visible, -math.inf)
            yield LogitsTile(q_rows, k_cols, scores, logits, visible)

    def visibility(self, q_rows: slice, k_cols: slice) -> bool | Tensor:
        """Return True or False where the window decides for the whole tile, else the bool mask [m, n]."""
        offset = self.n_k - self.n_q
        largest = q_rows.stop - 1 + offset - k_cols.start  # distance i + N - M - j in the lower left corner
        smallest = q_rows.start + offset - (k_cols.stop - 1)  # and in the upper right
        if largest < -self.right or smallest > self.left:
            return False
        if smallest >= -self.right and largest <= self.left:
            return True
        q_idx, k_idx = self.positions(q_rows, k_cols)
        distance = q_idx + offset - k_idx
        return (distance >= -self.right) & (distance <= self.left)

    def positions(self, q_rows: slice, k_cols: slice) -> tuple[Tensor, Tensor]:
        """Return the positions q_idx, int64 [m, 1], and k_idx, int64 [1, n], of a tile."""
        q_idx = torch.arange(q_rows.start, q_rows.stop, device=self.q.device)[:, None]
        k_idx = torch.arange(k_cols.start, k_cols.stop, device=self.q.device)[None, :]
        return q_idx, k_idx

    def dropout_factor(self, tile: LogitsTile) -> Tensor:
        """Return 1 / (1 - p) for kept weights and 0 for dropped ones, [B, Hk, G, m, n]."""
        batch, n_kv_heads, group = self.q.shape[:3]
        batch_head = torch.arange(batch * n_kv_heads * group, device=self.q.device)
        batch_head = batch_head.view(batch, n_kv_heads, group, 1, 1)
        q_idx, k_idx = self.positions(tile.q_rows, tile.k_cols)
        dropout_p = self.setting.dropout_p
        return keep_mask(self.setting.seed, batch_head, q_idx, k_idx, dropout_p).to(self.wide) / (1 - dropout_p)


def blocks(stop: int, block: int, begin: int = 0) -> Iterator[slice]:
    """Yield the slices that cut range(begin, stop) into blocks; the last may be shorter."""
    for start in range(begin, stop, block):
        yield slice(start, min(start + block, stop))
