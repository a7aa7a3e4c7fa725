"""Raw row, column and cross-token sums in O(N·D): scores are linear in q and in k, so sums may be taken first."""

from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import FULL, Setting
from stage2_triton_forward.describe import Sides, descriptor, mask_sides, padded_head_dim, readable
from stage2_triton_forward.hook import constant
from stage2_triton_forward.launcher import TileDescriptor, launch
from stage2_triton_forward.tile_config import cdiv

from .linear_sum_kernel import Ends, Rows, chunk_sum_kernel, interval_sum_kernel, prefix_sum_kernel
from .tile_config import LinearSumConfig, linear_sum_config, prefix_sum_config


def linear_row_sum(
    q: Tensor,
    k: Tensor,
    setting: Setting = FULL,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return Σ_j s·q_i·k_j = s·q_i·(Σ_j k_j) over the keys j that query i sees, [B, Hq, M] fp32.

    Args: q [B, Hq, M, D], k [B, Hk, N, D] and setting as in `stage2_triton_forward.launch.forward`; out: where to.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    ends = key_ends(mask_sides(n_q, n_k, setting.causal, setting.window))
    out = q.new_empty(q.shape[:3], dtype=torch.float32) if out is None else out
    return _interval_sums(q, k, ends, (0, n_k), setting, False, out)


def linear_col_sum(
    q: Tensor,
    k: Tensor,
    setting: Setting = FULL,
    *,
    q_begin: int = 0,
    k_stop: int | None = None,
    tile_sums: tuple[Tensor, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return Σ_i s·q_i·k_j = s·(Σ_i q_i)·k_j over the queries i >= q_begin, of all heads of k's group, that see key j.

    Args:
        q, k, setting, out: as in `linear_row_sum`.
        q_begin, k_stop: cut out the region of a cross-token sum.
        tile_sums: [B, Hq, query tiles, BLOCK_D] fp32, the sums of so many queries each, where the forward pass has left
            them (see `hooks.QUERY_SUMS`); None sums the queries up.

    Returns:
        [B, Hk, k_stop] fp32.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    ends = query_ends(mask_sides(n_q, n_k, setting.causal, setting.window))
    k_stop = n_k if k_stop is None else k_stop
    out = q.new_empty(*k.shape[:2], k_stop, dtype=torch.float32) if out is None else out
    return _interval_sums(k, q, ends, (q_begin, n_q), setting, True, out, tile_sums)


def key_ends(sides: Sides) -> tuple[int | None, int | None]:
    """Return (begin, stop): query i, which stands at key i + offset, sees the keys i + begin to i + stop."""
    left, right, offset = sides
    return None if left is None else offset - left, None if right is None else offset + right + 1


def query_ends(sides: Sides) -> tuple[int | None, int | None]:
    """Return (begin, stop): key j is seen by the queries j + begin to j + stop."""
    left, right, offset = sides
    return None if right is None else -offset - right, None if left is None else -offset + left + 1


class Chunks(NamedTuple):
    """Prefix sums of y, and all else that a kernel over its intervals needs."""

    y_desc: TileDescriptor
    rows: Rows
    ends: Ends
    n_sums: int  # one for each key head
    config: LinearSumConfig


def summed_chunks(
    x: Tensor,
    y: Tensor,
    ends: tuple[int | None, int | None],
    counted: tuple[int, int],
    key_padding_mask: Tensor | None,
    x_is_keys: bool,
    tile_sums: tuple[Tensor, int] | None = None,
) -> Chunks:
    """Sum y in chunks, for intervals i + ends[0] <= t < i + ends[1] of y for row i of x, t within `counted`.

    With `tile_sums`, of y, nothing is left to be summed.
    """
    n_sums = min(x.shape[1], y.shape[1])
    config = linear_sum_config(y)
    padded = key_padding_mask is not None
    padding = readable(key_padding_mask, torch.uint8)
    block_d = padded_head_dim(y.shape[3])
    constants = (padded and x_is_keys, padded and not x_is_keys, config.chunk, block_d, config.fp32_precision)
    n_keys = (x if x_is_keys else y).shape[2]
    rows = Rows(*counted, padding, n_keys, *map(constant, constants))
    y_desc = descriptor(y, config.chunk)
    left, right = ends
    no_left, no_right = left is None, right is None
    bounds = (left or 0, right or 0)
    if tile_sums is not None:
        sums, tile = tile_sums
        constants = (not no_left, not no_right, tile)
        return Chunks(
            y_desc, rows, Ends(sums, None, *bounds, 0, 0, sums.shape[2], 0, *map(constant, constants)), n_sums, config
        )
    to_right = None if no_right else _prefix_sums(y, y_desc, rows, right, n_sums, config)
    to_left = to_right if no_left and to_right else _prefix_sums(y, y_desc, rows, left or 0, n_sums, config)
    (left_sums, left_first), (right_sums, right_first) = to_left, to_right or to_left
    between = Ends(
        left_sums,
        right_sums,
        *bounds,
        left_first,
        right_first,
        left_sums.shape[2],
        right_sums.shape[2],
        *map(constant, (not no_left, not no_right, 0)),
    )
    return Chunks(y_desc, rows, between, n_sums, config)


def _interval_sums(x, y, ends, counted, setting, x_is_keys, out, tile_sums=None):
    """Fill out [B, Hx, n] with scale·x_i·Σ y_t over i + ends[0] <= t < i + ends[1], t within `counted`."""
    if out.numel() == 0:
        return out
    if counted[0] >= counted[1] or y.numel() == 0:
        return out.zero_()
    chunks = summed_chunks(x, y, ends, counted, setting.key_padding_mask, x_is_keys, tile_sums)
    config, n_sums = chunks.config, chunks.n_sums
    launch(
        interval_sum_kernel,
        (cdiv(out.shape[2], config.chunk), x.shape[0] * n_sums),
        config,
        descriptor(x, config.chunk),
        chunks.y_desc,
        out,
        chunks.rows,
        chunks.ends,
        out.shape[2],
        setting.scale(x.shape[3]),
        N_SUMS=n_sums,
        X_GROUP=x.shape[1] // n_sums,
        Y_HEADS=y.shape[1] // n_sums,
    )
    return out


def _prefix_sums(y, y_desc, rows, end, n_sums, config):
    """Sum y in chunks that start where ends do; return the prefix sums [B, n_sums, chunks, BLOCK_D] and the start."""
    first = -(-end % config.chunk)  # in (-chunk, 0], a whole number of chunks away from `end`
    n_chunks = cdiv(y.shape[2] - first, config.chunk)
    block_d = rows.BLOCK_D.value
    sums = y.new_empty(y.shape[0], n_sums, n_chunks, block_d, dtype=torch.float64)
    heads = y.shape[0] * n_sums
    of_heads = {"N_SUMS": n_sums, "Y_HEADS": y.shape[1] // n_sums}
    launch(chunk_sum_kernel, (n_chunks, heads), config, y_desc, sums, rows, first, **of_heads)
    prefix = prefix_sum_config()
    of_columns = {"BLOCK": config.block, "BLOCK_D": block_d, "WIDTH": prefix.width}
    launch(prefix_sum_kernel, (heads, block_d // prefix.width), prefix, sums, n_chunks, **of_columns)
    return sums, first
