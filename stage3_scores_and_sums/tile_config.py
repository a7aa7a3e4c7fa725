"""Tile sizes of stage 3's own kernels. Hooks run in the forward loop, whose sizes stage 2 picks."""

from typing import NamedTuple

import torch
from torch import Tensor

from stage2_triton_forward.tile_config import TileConfig, architecture, chosen, of_width


class LinearSumConfig(NamedTuple):
    """What the linear-time sums need to know beside their inputs."""

    chunk: int  # rows that are summed at once
    num_warps: int
    num_stages: int
    fp32_precision: str = "ieee"  # of tl.dot; matters for fp32 inputs only
    block: int = 64  # chunks whose prefix sums are taken at once


class PrefixSumConfig(NamedTuple):
    """What the prefix sums of chunks need to know."""

    width: int  # columns of a program
    num_warps: int
    num_stages: int


_HOPPER = {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 64, 4, 2), 256: TileConfig(64, 64, 4, 2)}
_HOPPER_FP32 = TileConfig(32, 64, 4, 2, "tf32x3")
_ANY_GPU = {64: TileConfig(32, 64, 4, 2), 128: TileConfig(32, 64, 4, 2), 256: TileConfig(16, 32, 4, 2)}
_INTERPRETED = dict.fromkeys(_HOPPER, TileConfig(64, 64, 4, 2))


def column_sum_config(q: Tensor) -> TileConfig:
    """Return the config of the key-stationary loop for q [B, Hq, M, D]: block_n keys are owned, block_m are walked."""
    if chosen("column_sum") is not None:
        return chosen("column_sum")
    arch = architecture()
    if arch == 90 and q.dtype == torch.float32:
        return _HOPPER_FP32
    config = of_width(_INTERPRETED if arch is None else _HOPPER if arch == 90 else _ANY_GPU, q.shape[3])
    if q.dtype == torch.float32:
        config = config._replace(block_m=max(16, config.block_m // 2), block_n=max(16, config.block_n // 2))
    return config


def linear_sum_config(x: Tensor) -> LinearSumConfig:
    """Return the config of the linear-time sums for x [B, H, N, D]."""
    if chosen("linear_sum") is not None:
        return chosen("linear_sum")
    hopper = architecture() == 90
    if x.dtype == torch.float32:
        return LinearSumConfig(32, 4, 2, "tf32x3" if hopper else "ieee")
    return LinearSumConfig(64, 4, 2) if hopper and x.shape[3] <= 128 else LinearSumConfig(32, 4 if hopper else 8, 2)


def prefix_sum_config() -> PrefixSumConfig:
    """Return the config of the prefix sums."""
    return PrefixSumConfig(width=16, num_warps=4, num_stages=3)
