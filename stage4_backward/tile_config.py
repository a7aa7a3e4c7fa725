"""Tile sizes of the backward kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from stage2_triton_forward.tile_config import TileConfig, Warps, architecture, chosen, of_width


class Rows(NamedTuple):
    """The configs of one head dimension."""

    grad_q: TileConfig
    grad_kv: TileConfig


_HOPPER = {
    64: Rows(TileConfig(128, 64, 8, 3), TileConfig(32, 64, 4, 3)),
    128: Rows(TileConfig(128, 64, 8, 3), TileConfig(64, 64, 4, 2)),
    256: Rows(TileConfig(64, 32, 8, 1), TileConfig(32, 64, 8, 1)),
}
_HOPPER_FP32 = {
    64: Rows(TileConfig(64, 32, 4, 2, "tf32x3"), TileConfig(32, 64, 4, 1, "tf32x3")),
    128: Rows(TileConfig(64, 32, 4, 2, "tf32x3"), TileConfig(32, 16, 4, 2, "tf32x3")),
    256: Rows(TileConfig(32, 32, 8, 1, "tf32x3"), TileConfig(32, 32, 8, 1, "tf32x3")),
}
_ANY_GPU = {
    64: Rows(TileConfig(64, 32, 8, 1), TileConfig(32, 64, 8, 1)),
    128: Rows(TileConfig(64, 32, 8, 1), TileConfig(32, 64, 8, 1)),
    256: Rows(TileConfig(32, 16, 8, 1), TileConfig(16, 32, 8, 1)),
}
_SMALL = {width: Rows(*[TileConfig(16, 16, 4, 1)] * 2) for width in _HOPPER}  # fp32 without tf32x3, and old GPUs
_INTERPRETED = {width: Rows(TileConfig(64, 64, 4, 1), TileConfig(64, 64, 4, 1)) for width in _HOPPER}


def backward_configs(q: Tensor, head_dim_v: int) -> Rows:
    """Return the configs of the two gradient kernels for q [B, Hq, M, D] and Dv."""
    arch = architecture()
    if arch is None:
        table = _INTERPRETED
    elif q.dtype == torch.float32:
        table = _HOPPER_FP32 if arch == 90 else _SMALL
    else:
        table = _HOPPER if arch == 90 else _ANY_GPU if arch >= 80 else _SMALL
    rows = of_width(table, max(q.shape[3], head_dim_v))
    return Rows(chosen("grad_q") or rows.grad_q, chosen("grad_kv") or rows.grad_kv)


def interval_vector_config() -> Warps:
    """Return the config of the sums of vectors over intervals."""
    return Warps(num_warps=8, num_stages=1)


def delta_config() -> Warps:
    """Return the config of the kernel that computes delta."""
    return Warps(num_warps=4)
