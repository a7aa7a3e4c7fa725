"""Tile sizes of stage 3's own kernels. Hooks run in the forward loop, whose sizes stage 2 picks."""

from typing import NamedTuple

import torch
from torch import Tensor

from stage2_triton_forward.tile_config import TileConfig, architecture, chosen, of_width, splits_of_queries

_FEW = 4096  # rows: up to here a call is bound by its launches
_SHORT_WALK, _LONG_WALK = 32, 128  # tiles
_MANY = 128  # programs


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


def row_sum_algorithm(n_q: int, n_k: int) -> str:
    """Return how to sum rows of raw scores: in one launch, whose loop also sums, or in launches beside a plain loop."""
    return "kahan" if max(n_q, n_k) <= _FEW else "linear"


def has_few_queries(q: Tensor, k: Tensor) -> bool:
    """Return whether column sums are made of what the forward loop has summed: more launches would cost more."""
    return 1 < q.shape[2] <= _FEW and k.shape[2] > 0 and splits_of_queries(q, k) == 1


def heads_of_a_program(group: int, n_programs: int, n_steps: int) -> int:
    """Return how many heads of a group a program of the column sums walks one after the other.

    Args:
        group: query heads to a key head.
        n_programs: if each walks a whole group.
        n_steps: tiles of one head.

    Returns:
        group, or 1: each head has programs of its own, which balance better, and their sums are to be added up.
    """
    return group if group * n_steps <= _SHORT_WALK or (n_programs >= _MANY and group * n_steps <= _LONG_WALK) else 1
