"""The backward pass in PyTorch: weights are computed again, tile by tile, from the lse; no tensor has M×N elements."""

import shutil
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import FULL, Setting
from stage1_pytorch_tiled.tiled_forward import TileGrid, blocks, weight_tiles

from .gradients import Gradients

_WORTH_COMPILING = 1024  # tiles: below, compiling would take longer than the work


def recompute_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    grads: Gradients,
    setting: Setting = FULL,
    *,
    block_m: int = 64,
    block_n: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of attention, its scores, sums and entropies, from q, k, v, the output and the lse.

    Args:
        q, k, v, setting: as in the forward pass, [B, H, N, D].
        output: [B, Hq, M, Dv], lse: [B, Hq, M]: its results.
        grads: of all that it returned.
        block_m, block_n: queries and keys in a tile.

    Returns:
        gradients of q, k and v in their dtypes, and of sinks (None without); 0 for rows that see nothing.

    Source: FlashAttention-2 (Dao 2023), eq. 13-19 and Algorithm 2.
    """
    grid = TileGrid(q, k, setting, block_m=block_m, block_n=block_n)
    wide, heads = grid.wide, grid.q.shape[1:3]  # (Hk, G)
    grad_output = torch.zeros_like(output) if grads.output is None else grads.output
    grad_output = grad_output.to(wide).unflatten(1, heads)  # [B, Hk, G, M, Dv]
    row_lse = lse.unflatten(1, heads)[..., None]  # [B, Hk, G, M, 1]
    column_grads = _ColumnGrads(grid, grads, row_lse)

    raise NotImplementedError("Task 4.1: step 1: delta, the number that each row subtracts")
    if grads.lse is not None:
        raise NotImplementedError("Task 4.1: step 2: what the gradient of the lse changes in delta")
    if grads.softmax_col_sum is not None or grads.entropy is not None:  # the softmax's own backward: P·g
        raise NotImplementedError("Task 4.6: walk the weights once more, and add P·g to delta")

    grad_q = torch.zeros(grid.q.shape, dtype=wide, device=q.device)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    n_tiles = (grid.n_q // block_m + 1) * (grid.n_k // block_n + 1)
    step = tile_step(q.device.type) if n_tiles >= _WORTH_COMPILING else tile_gradients
    for q_rows in blocks(grid.n_q, block_m):
        q_tile = grid.q[..., q_rows, :].to(wide)
        grad_rows = grad_output[..., q_rows, :]
        for tile in grid.tiles_of(q_rows):
            cols = tile.k_cols
            factor = grid.dropout_factor(tile) if setting.dropout_p > 0 else None
            grad_logits, grad_v_tile = step(
                tile.logits,
                row_lse[..., q_rows, :],
                grad_rows,
                v[:, :, None, cols].to(wide),
                delta[..., q_rows, None],
                column_grads.of_weights(tile),
                factor,
            )
            if setting.softcap is not None:
                raise NotImplementedError("Task 4.4: step 1: back through the softcap")
            grad_logits = grad_logits + column_grads.of_scores(tile)
            raise NotImplementedError("Task 4.4: step 2: what this tile adds to the gradients of q, k and v")
    grad_sinks = None if setting.sinks is None else grad_of_sinks(setting.sinks, lse, delta.flatten(1, 2))
    raise NotImplementedError("Task 4.4: step 3: the factor s, the heads in one dimension, the inputs' dtypes; return")


def tile_gradients(
    logits: Tensor,
    row_lse: Tensor,
    grad_output: Tensor,
    v_tile: Tensor,
    delta: Tensor,
    column_grads: Tensor | float,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of one tile of logits, and what the tile gives to the gradient of its values.

    Args:
        logits: [B, Hk, G, m, n], -inf where masked.
        row_lse: [B, Hk, G, m, 1].
        grad_output: [B, Hk, G, m, Dv].
        v_tile: [B, Hk, 1, n, Dv].
        delta: [B, Hk, G, m, 1].
        column_grads: broadcasts to the tile, added to the gradient of the weights; column sums gave it, and entropies.
        factor: [B, Hk, G, m, n] or None, what dropout multiplies the weights by.

    Returns:
        [B, Hk, G, m, n] and [B, Hk, n, Dv].
    """
    raise NotImplementedError("Task 4.2: the weights from the lse, what dropout keeps of them, and the gradient of v")
    raise NotImplementedError("Task 4.3: the gradient of the weights, and through the softmax that of the logits")


@cache
def tile_step(device_type: str) -> Callable:
    """Return `tile_gradients`, compiled where a compiler is present; else say once that it is not."""
    if device_type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        warnings.warn(
            "no C++ compiler found: the backward pass in PyTorch runs eagerly, several times slower", stacklevel=2
        )
        return tile_gradients
    return torch.compile(tile_gradients, dynamic=True)


class _ColumnGrads:
    """Gradients that reach tiles through scores, sums and entropies; sums, where the matrix was summed."""

    def __init__(self, grid: TileGrid, grads: Gradients, row_lse: Tensor):
        self.heads = grid.q.shape[1:3]
        self.grads = grads
        self.grid = grid
        q_stop = grid.n_q if grads.q_stop is None else grads.q_stop
        self.counted = torch.zeros(grid.n_q, 1, dtype=grid.wide, device=grid.q.device)
        self.counted[grads.q_begin : q_stop] = 1
        self.columns = self._of_all_keys(grads.col_sum)
        self.softmax_columns = self._of_all_keys(grads.softmax_col_sum)
        self.row_lse = row_lse  # [B, Hk, G, M, 1]

    def _of_all_keys(self, grad: Tensor | None) -> Tensor | None:
        """Return [B, Hk, 1 or G, 1, N], 0 for keys that were not summed."""
        if grad is None:
            return None
        grad = torch.nn.functional.pad(grad.to(self.grid.wide), (0, self.grid.n_k - grad.shape[2]))
        return grad.unflatten(1, (self.heads[0], -1))[..., None, :]

    def of_weights(self, tile) -> Tensor | float:
        """Return what is added to a tile's gradient of weights."""
        total = 0.0
        if self.softmax_columns is not None:
            total = total + self.softmax_columns[..., tile.k_cols] * self.counted[tile.q_rows]
        if self.grads.entropy is not None:
            rows = self.grads.entropy.to(self.grid.wide).unflatten(1, self.heads)[..., tile.q_rows, None]
            slope = self.row_lse[..., tile.q_rows, :] - tile.logits - 1  # dH/dP = -ln P - 1
            total = total + rows * slope.masked_fill(torch.isneginf(tile.logits), 0)
        return total

    def of_scores(self, tile) -> Tensor | float:
        """Return what is added to a tile's gradient of raw scores, 0 where not visible."""
        total = 0.0
        if self.grads.scores is not None:
            total = total + self.grads.scores.to(self.grid.wide).unflatten(1, self.heads)[..., tile.q_rows, tile.k_cols]
        if self.grads.row_sum is not None:
            total = total + self.grads.row_sum.to(self.grid.wide).unflatten(1, self.heads)[..., tile.q_rows, None]
        if self.columns is not None:
            total = total + self.columns[..., tile.k_cols] * self.counted[tile.q_rows]
        if tile.visible is not None and isinstance(total, Tensor):
            total = total * tile.visible
        return total


def grad_of_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Return -Σ_i P_sink,i·delta_i, [Hq]: a sink takes weight and gives no value."""
    raise NotImplementedError("Task 4.5: the weights of the sinks, and what their rows' delta makes of them")
