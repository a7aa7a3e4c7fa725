"""Tile sizes, warps and pipeline stages: the only file that picks numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

_L2_SHARE = 32 * 2**20  # bytes of keys and values that stay in L2 while the heads that read them take turns


class TileConfig(NamedTuple):
    """What a launch needs to know beside its inputs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    fp32_precision: str = "ieee"


def simple_config(dtype: torch.dtype, block_d: int) -> TileConfig:
    """Return the teaching kernel's tiles: 64×64, less for fp32 and wide rows, which would not fit on chip."""
    row_bytes = block_d * dtype.itemsize
    block = 64 if dtype.itemsize == 2 and row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return TileConfig(block_m=block, block_n=block, num_warps=4, num_stages=2)


def forward_config(q: Tensor, head_dim_v: int, causal: bool, has_dropout: bool, has_hook: bool) -> TileConfig:
    """Return the tiles of the forward loop; small enough for the shared memory of every GPU since sm_75."""
    if q.shape[2] <= 16 and q.dtype.itemsize <= 2:
        return TileConfig(block_m=16, block_n=64, num_warps=4, num_stages=3)
    if q.dtype == torch.float32 or max(q.shape[3], head_dim_v) > 128:
        return TileConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)
    return TileConfig(block_m=64, block_n=64, num_warps=4, num_stages=2)


def heads_together(k: Tensor, v: Tensor, n_heads: int, batch: int) -> int:
    """Return how many query heads to interleave, so that their keys and values fill a good part of L2."""
    bytes_per_kv_head = k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    group = n_heads // k.shape[1]
    return min(batch * n_heads, max(1, _L2_SHARE // max(bytes_per_kv_head, 1)) * group)


def split_count(n_programs: int, n_k: int, device: torch.device) -> int:
    """Return into how many parts to cut the keys: two programs for every multiprocessor, 256 keys each at least."""
    if device.type != "cuda":
        return 1
    n_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    if n_programs >= n_multiprocessors:
        return 1
    return max(1, min(2 * n_multiprocessors // n_programs, n_k // 256, 128))


def merge_warps(n_splits: int) -> int:
    """Return the warps that merge one row."""
    return 4 if n_splits >= 16 else 1
