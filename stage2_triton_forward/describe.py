"""What kernels are told, made from tensors and a Setting: who sees whom, how scores become logits, tiles, layouts."""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.philox import drop_threshold
from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.visibility import Window, visible_sides

from .forward_kernel import Logits, Loop, Tiles
from .hook import constant
from .launcher import Known, Layout, TileDescriptor, kind_number, known
from .tile_config import TileConfig, power_of_2
from .tiles import Dropout, Mask

_ALIGNMENT = 16  # bytes: what the hardware asks of a tile's base address and strides
_MANY = 4096  # shapes that are remembered: a cache that grows token by token has a new one at every step


def describe_loop(q: Tensor, k: Tensor, head_dim_v: int, setting: Setting, config: TileConfig) -> Known:
    """Describe a loop over the tiles of q [B, Hq, M, D] and k [B, Hk, N, D], with values of width `head_dim_v`."""
    causal, sm_scale, dropout_p, seed, window, softcap, _, padding, _ = setting
    loop, kind = _loop_of_numbers(
        *(q.shape[1] // k.shape[1], q.shape[2], k.shape[2], q.shape[3], head_dim_v, q.dtype),
        *(causal, sm_scale, dropout_p, seed if dropout_p else 0, window, softcap, padding is not None, config),
    )
    if padding is None:
        return Known(loop, kind)
    padding = padding.to(torch.uint8).contiguous()
    mask = loop.mask._replace(padding_ptr=padding)
    return Known(loop._replace(mask=mask), (kind, padding.data_ptr() % _ALIGNMENT == 0))


@lru_cache(maxsize=_MANY)
def _loop_of_numbers(
    group: int, n_q: int, n_k: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, causal: bool,
    sm_scale: float | None, dropout_p: float, seed: int, window: Window, softcap: float | None, padded: bool,
    config: TileConfig,
) -> Known:  # fmt: skip
    """Return the Loop of numbers alone; of a key padding mask it knows only that there is one."""
    scale = Setting(sm_scale=sm_scale).scale(head_dim)
    widths = (padded_head_dim(width, dtype) for width in (head_dim, head_dim_v))
    return known(
        Loop(
            describe_mask(n_q, n_k, causal, window, padded),
            describe_logits(scale, softcap, config.fp32_precision),
            Dropout(seed, drop_threshold(dropout_p), 1 / (1 - dropout_p), constant(dropout_p > 0)),
            Tiles(*map(constant, (group, config.block_m, config.block_n, *widths))),
        )
    )


def describe_mask(n_q: int, n_k: int, causal: bool, window: Window, padded: bool) -> Mask:
    """Describe who sees whom; a padding mask's pointer is left to be filled in."""
    left, right, offset = mask_sides(n_q, n_k, causal, window)
    bounds = (left is not None, right is not None, padded)
    return Mask(n_q, n_k, offset, left or 0, right or 0, None, *map(constant, bounds))


class Sides(NamedTuple):
    """Who sees whom: query i sees key j iff -right <= i + offset - j <= left; None for no bound."""

    left: int | None
    right: int | None
    offset: int  # N - M: query i stands at key i + offset, the last query at the last key


def mask_sides(n_q: int, n_k: int, causal: bool, window: Window) -> Sides:
    """Return how far a query sees to either side of where it stands."""
    farthest = n_q + n_k  # no key lies farther from a query; a larger bound could overflow 32 bits
    left, right = (None if side is None else min(side, farthest) for side in visible_sides(causal, window))
    return Sides(left, right, n_k - n_q)


@lru_cache(maxsize=_MANY)
def describe_logits(scale: float, softcap: float | None, fp32_precision: str) -> Logits:
    """Describe how q·kᵀ becomes logits for the kernels, whose q has the sign of the scale; see `signed`."""
    cap = 1.0 if softcap is None else float(softcap)
    return Logits(abs(scale) or 1.0, cap, *map(constant, (softcap is not None, fp32_precision)))


def signed(x: Tensor, setting: Setting) -> Tensor:
    """Return x times the sign of the scale (0 for a scale of 0): kernels take a row's max before they scale.

    It is done here because Triton 3.6 computes wrong products, in loops without a mask, from a tile changed in between.
    """
    if setting.sm_scale is None or setting.sm_scale > 0:
        return x
    return (x.float() * (-1.0 if setting.sm_scale < 0 else 0.0)).to(x.dtype)


def readable(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return what a kernel reads through a bare pointer, which knows nothing of strides: x, contiguous.

    Args:
        x: any strides; None where the kernel reads nothing.
        dtype: what x is converted to; None leaves it.
    """
    if x is None:
        return None
    return (x if dtype is None else x.to(dtype)).contiguous()


def descriptor(x: Tensor, block_rows: int, block_d: int | None = None) -> TileDescriptor:
    """Describe [B, H, N, D] for tiles of `block_rows` rows of all columns, clipped at the end of each head."""
    layout = _layout(x.shape, x.stride(), x.dtype, block_rows, block_d)
    if layout is None or x.data_ptr() % _ALIGNMENT:
        x = _room(x).copy_(x)
        layout = _layout(x.shape, x.stride(), x.dtype, block_rows, block_d)
    return TileDescriptor(x, layout)


def describable(x: Tensor) -> Tensor:
    """Return x, or room of its shape whose layout a descriptor accepts, for a result to be copied from."""
    fits = _layout(x.shape, x.stride(), x.dtype, 1, None) is not None and x.data_ptr() % _ALIGNMENT == 0
    return x if fits else _room(x)


@lru_cache(maxsize=_MANY)
def _layout(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, block_rows: int, block_d: int | None
) -> Layout | None:
    """Return how a descriptor sees a tensor; None where the hardware cannot step through it."""
    alignment = _ALIGNMENT // dtype.itemsize
    outer = [step for size, step in zip(shape[:3], strides[:3], strict=True) if size > 1]
    if (strides[3] != 1 and shape[3] > 1) or any(step <= 0 or step % alignment for step in outer):
        return None
    free = alignment * math.prod(shape)  # of a dimension of size 1, whose own stride may be anything
    steps = [free if size == 1 else step for size, step in zip(shape[:3], strides[:3], strict=True)]
    tile = [1, 1, block_rows, block_d or padded_head_dim(shape[3], dtype)]
    return Layout(tuple(shape), (*steps, 1), tile, kind_number((dtype, *tile)))


def _room(x: Tensor) -> Tensor:
    """Return an empty tensor of x's shape and dtype, with rows that start where the hardware wants them."""
    alignment = _ALIGNMENT // x.element_size()
    padded_dim = math.ceil(x.shape[3] / alignment) * alignment
    return torch.empty(*x.shape[:3], padded_dim, dtype=x.dtype, device=x.device)[..., : x.shape[3]]


@cache
def padded_head_dim(head_dim: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the tile width for a head dimension: a power of two that tl.dot accepts (from 32 on for fp8)."""
    return max(32 if dtype.itemsize == 1 else 16, power_of_2(head_dim))


def output_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of q's attention: its own, bf16 for fp8."""
    return torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
