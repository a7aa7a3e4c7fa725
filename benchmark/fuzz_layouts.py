"""The same values in memory of every kind: permuted, with steps, expanded, in the middle of NaNs."""

from random import Random

import torch
from torch import Tensor

KINDS = ("contiguous", "offset", "permuted", "strided", "expanded", "all")


def lay_out(x: Tensor, rng: Random, kind: str | None = None) -> Tensor:
    """Return x, laid out at random in memory that is NaN (for bools: at random True) everywhere else.

    Args:
        x: any tensor. An expanded one keeps the first element along each dimension of stride 0.
        rng: what is drawn from.
        kind: one of KINDS; None draws it.

    Returns:
        a tensor of x's shape, dtype and device.
    """
    kind = rng.choice(KINDS) if kind is None else kind
    every = kind == "all"
    dims = range(x.ndim)
    repeated = [d for d in dims if x.shape[d] > 1 and (kind == "expanded" or every) and rng.random() < 0.4]
    inner = x
    for d in repeated:
        inner = inner.narrow(d, 0, 1)
    order = rng.sample(dims, x.ndim) if kind == "permuted" or (every and rng.random() < 0.5) else list(dims)
    shape, cuts = [], []
    for d in order:
        step = rng.choice((1, 2, 2, 3)) if kind == "strided" or (every and rng.random() < 0.3) else 1
        before, after = (rng.choice((0, 1, 2, 3)) if kind == "offset" or every else 0 for _ in range(2))
        length = inner.shape[d] * step
        shape.append(before + length + after)
        cuts.append(slice(before, before + length, step))
    storage = _poisoned(shape, x, rng)
    placed = storage[tuple(cuts)].permute([order.index(d) for d in dims])
    return placed.copy_(inner).expand(x.shape)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rng: Random) -> Tensor:
    """Return a contiguous buffer of NaN in the middle of a larger storage, which `memory` shows whole."""
    before, after = rng.choice((0, 4, 64)), rng.choice((1, 64))
    n = torch.Size(shape).numel()
    storage = torch.full((before + n + after,), torch.nan, dtype=dtype, device=device)
    return storage[before : before + n].view(shape)


def memory(x: Tensor) -> Tensor:
    """Return all of the storage behind a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def layout(x: Tensor) -> str:
    """Return shape, strides and offset, to be printed."""
    offset = f" offset {x.storage_offset()}" if x.storage_offset() else ""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} strides {list(x.stride())}{offset}"


def _poisoned(shape: list[int], like: Tensor, rng: Random) -> Tensor:
    if like.dtype == torch.bool:
        values = [rng.random() < 0.5 for _ in range(torch.Size(shape).numel())]
        return torch.tensor(values, dtype=torch.bool, device=like.device).view(shape)
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)
