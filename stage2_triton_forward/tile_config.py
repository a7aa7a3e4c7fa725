"""Tile sizes, warps and pipeline stages: the only file that picks numbers.

The rows for sm_90 come from `python -m benchmark.run search` on an H200 (`benchmark/results/search.json`); the others
are for GPUs that nobody has searched on: small enough for the shared memory of every GPU since sm_75.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

_L2_SHARE = 16 * 2**20  # bytes of keys and values that stay in L2 while the heads that read them take turns
_SHORT = 16  # queries: up to here a call is decoding, bound by reading keys and values


class TileConfig(NamedTuple):
    """What a launch needs to know beside its inputs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    fp32_precision: str = "ieee"  # of tl.dot; matters for fp32 inputs only


_chosen: dict[str, tuple] = {}


@contextmanager
def choose(**configs: tuple) -> Iterator[None]:
    """Launch with these configs, whatever the tables say: `choose(forward=…, column_sum=…)`; what a search needs."""
    before = dict(_chosen)
    _chosen.update(configs)
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


def chosen(loop: str) -> Any:
    """Return the config that `choose` holds for a loop, or None: then the tables decide."""
    return _chosen.get(loop)


def nothing_is_chosen() -> bool:
    """Return whether the tables decide about every loop."""
    return not _chosen


def cdiv(a: int, b: int) -> int:
    """Return how many times b goes into a, rounded up; triton.cdiv is made for kernels, and slow on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


class Rows(NamedTuple):
    """The configs of one head dimension; what needs more registers than the plain loop gets smaller tiles."""

    plain: TileConfig
    guarded: TileConfig  # a window's left edge, key padding, softcap or a hook, and calls too short for `plain`
    dropout: TileConfig
    short: TileConfig
    fp32: TileConfig
    storing: TileConfig  # a hook that writes every tile: bound by memory, so that many small programs overlap best


_HOPPER = {
    64: Rows(
        plain=TileConfig(64, 128, 4, 2),
        guarded=TileConfig(64, 64, 4, 3),
        dropout=TileConfig(64, 32, 4, 2),
        short=TileConfig(16, 128, 4, 3),
        fp32=TileConfig(64, 32, 4, 2, "tf32x3"),
        storing=TileConfig(64, 64, 4, 3),
    ),
    128: Rows(
        plain=TileConfig(128, 64, 4, 2),
        guarded=TileConfig(64, 64, 4, 3),
        dropout=TileConfig(64, 32, 4, 2),
        short=TileConfig(16, 128, 4, 3),
        fp32=TileConfig(128, 32, 8, 2, "tf32x3"),
        storing=TileConfig(64, 32, 4, 3),
    ),
    256: Rows(
        plain=TileConfig(128, 64, 8, 2),
        guarded=TileConfig(64, 64, 4, 2),
        dropout=TileConfig(32, 32, 4, 1),
        short=TileConfig(16, 32, 4, 3),
        fp32=TileConfig(64, 32, 4, 2, "tf32x3"),
        storing=TileConfig(64, 32, 4, 2),
    ),
}
_ANY_GPU = {
    **dict.fromkeys(
        (64, 128),
        Rows(
            *[TileConfig(128, 32, 8, 2)] * 2,
            dropout=TileConfig(64, 16, 4, 2),
            short=TileConfig(16, 32, 4, 2),
            fp32=TileConfig(16, 32, 4, 2),
            storing=TileConfig(128, 32, 8, 2),
        ),
    ),
    256: Rows(
        *[TileConfig(64, 16, 4, 2)] * 3,
        short=TileConfig(16, 16, 4, 2),
        fp32=TileConfig(16, 16, 4, 1),
        storing=TileConfig(64, 16, 4, 2),
    ),
}
_TURING = {
    width: Rows(*[TileConfig(*tiles, 4, 1)] * 6) for width, tiles in ((64, (64, 32)), (128, (32, 32)), (256, (16, 16)))
}
_INTERPRETED = dict.fromkeys(
    _HOPPER, Rows(*[TileConfig(64, 64, 4, 2)] * 3, *[TileConfig(16, 64, 4, 2)] * 2, storing=TileConfig(64, 64, 4, 2))
)


def simple_config(dtype: torch.dtype, block_d: int) -> TileConfig:
    """Return the teaching kernel's tiles: 64×64, less for fp32 and wide rows, which would not fit on chip."""
    row_bytes = block_d * dtype.itemsize
    block = 64 if dtype.itemsize == 2 and row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return TileConfig(block_m=block, block_n=block, num_warps=4, num_stages=2)


def forward_config(q: Tensor, head_dim_v: int, guarded: bool, has_dropout: bool, storing: bool = False) -> TileConfig:
    """Return the config of the forward loop.

    Args:
        q: [B, Hq, M, D]; its shape and dtype count.
        head_dim_v: Dv.
        guarded: whether the loop does more than a causal mask: a window, key padding, softcap or a hook.
        has_dropout: whether weights are dropped.
        storing: whether a hook stores every tile of logits.
    """
    if chosen("forward") is not None:
        return chosen("forward")
    batch, n_heads, n_q, head_dim = q.shape
    call = (batch * n_heads, n_q, max(head_dim, head_dim_v), guarded, has_dropout, storing)
    return _forward_config(architecture(), q.dtype, q.device, *call)


@lru_cache(maxsize=4096)
def _forward_config(
    arch: int | None, dtype: torch.dtype, device: torch.device, n_heads: int, n_q: int, width: int, guarded: bool,
    has_dropout: bool, storing: bool,
) -> TileConfig:  # fmt: skip
    """Return the config of the forward loop for `n_heads` heads of all batches; see `forward_config`."""
    rows = of_width(_table(arch), width)
    if dtype == torch.float32:
        return rows.fp32
    if has_dropout:
        return rows.dropout
    if n_q <= _SHORT:
        return rows.short
    if storing:
        return rows.storing
    n_programs = n_heads * cdiv(n_q, rows.plain.block_m)
    return rows.guarded if guarded or n_programs <= 2 * _multiprocessors(device) else rows.plain


@cache
def _multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 0 for none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def architecture() -> int | None:
    """Return the compute capability that kernels are compiled for, such as 90; None in the interpreter."""
    if knobs.runtime.interpret:
        return None
    driver: Any = triton.runtime.driver.active
    return _architecture_of(driver, driver.get_current_device())


@cache
def _architecture_of(driver, device: int) -> int:
    """Ask a driver for the compute capability of its current device, once for each device."""
    return driver.get_current_target().arch


def of_width(table: dict, width: int):
    """Return the row of the smallest head dimension that holds `width`."""
    return table[min(limit for limit in table if limit >= width)]


def _table(arch: int | None) -> dict[int, Rows]:
    """Return the configs of an architecture."""
    if arch is None:
        return _INTERPRETED
    return _HOPPER if arch == 90 else _TURING if arch < 80 else _ANY_GPU


def heads_together(k: Tensor, v: Tensor, n_heads: int, batch: int, rows_differ: bool, storing: bool = False) -> int:
    """Return how many query heads to interleave.

    Where rows differ in length (causal), the long ones of several heads come first, as many heads as L2 holds keys and
    values for. Where all are alike there is nothing to balance, and one group of heads at a time reads L2 best; so it
    does where a hook stores scores, which pass through L2 and drive keys out.
    """
    _, n_kv_heads, n_k, head_dim = k.shape
    group = n_heads // n_kv_heads
    if storing or not rows_differ:
        return group
    bytes_per_kv_head = n_k * (head_dim + v.shape[3]) * k.element_size()
    return min(batch * n_heads, max(1, _L2_SHARE // max(bytes_per_kv_head, 1)) * group)


def splits_of_queries(q: Tensor, k: Tensor) -> int:
    """Return into how many parts to cut the keys k [B, Hk, N, D] for all queries q [B, Hq, M, D]."""
    batch, n_heads, n_q, _ = q.shape
    return split_count(batch * n_heads * cdiv(max(n_q, 1), 64), k.shape[2], q.device)


def split_count(n_programs: int, n_k: int, device: torch.device) -> int:
    """Return into how many parts to cut the keys: a program for every multiprocessor at most, 256 keys each at least.

    It is a power of two: a cache that grows token by token meets few variants of the kernel.
    """
    n_multiprocessors = _multiprocessors(device)
    if n_programs == 0 or n_programs >= n_multiprocessors:
        return 1
    parts = max(1, min(n_multiprocessors // n_programs, n_k // 256, 128))
    return 1 << (parts.bit_length() - 1)


class Warps(NamedTuple):
    """What a launch without tiles to choose needs to know."""

    num_warps: int
    num_stages: int = 3


def merge_config(n_splits: int) -> Warps:
    """Return the config of the kernel that merges one row of `n_splits` parts."""
    return Warps(4 if n_splits >= 16 else 1)
