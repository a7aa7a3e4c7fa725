"""Tile sizes, warps and pipeline stages: the only file that picks numbers."""

from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    """What a launch needs to know beside its inputs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def simple_config(dtype: torch.dtype, block_d: int) -> TileConfig:
    """Return the teaching kernel's tiles: 64×64, less for fp32 and wide rows, which would not fit on chip."""
    row_bytes = block_d * dtype.itemsize
    block = 64 if dtype.itemsize == 2 and row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return TileConfig(block_m=block, block_n=block, num_warps=4, num_stages=2)


def forward_config(dtype: torch.dtype, head_dim: int) -> TileConfig:
    """Return the tiles of the forward loop; small enough for the shared memory of every GPU since sm_75."""
    if dtype == torch.float32 or head_dim > 128:
        return TileConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)
    return TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)
