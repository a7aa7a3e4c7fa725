"""One call of the library at its door: arguments checked, its setting made, its backend chosen."""

from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import Setting

from . import pytorch_backend
from .backend import Backend
from .validation import check_attention, check_backend, check_features

_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


class Problem(NamedTuple):
    """Attention to be computed, with valid arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    setting: Setting
    backend: Backend


def checked_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    seed: int | None,
    backend: str | None,
    *,
    descales: tuple | None = None,
    allow_fp8: bool = False,
) -> Problem:
    """Check the arguments that all functions of attention share; raise TypeError or ValueError.

    Under autocast q, k and v are cast to its dtype, as PyTorch's own attention does it. A seed of None is drawn from
    torch's generator where weights are dropped.

    Args:
        q, k, v: the caller's.
        setting: of the caller's arguments, seed and descale left out.
        seed, backend, descales: the caller's.
        allow_fp8: whether q, k and v may be fp8.
    """
    q, k, v = autocasted(q, k, v)
    check_attention(q, k, v, setting, seed, allow_fp8)
    check_features(q, k, setting, descales)
    chosen = choose_backend(backend, q)
    if setting.dropout_p > 0:
        setting = setting._replace(seed=int(torch.randint(2**62, ())) if seed is None else seed)
    if type(setting.window) is list:
        setting = setting._replace(window=tuple(setting.window))
    return Problem(q, k, v, setting, chosen)


def choose_backend(backend: str | None, q: Tensor) -> Backend:
    """Return the backend asked for, or the one of q's device; its kernels are imported when they are first needed."""
    if check_backend(backend, q) == "pytorch":
        return pytorch_backend
    kernels = _kernels[0] if _kernels else _import_kernels()
    kernels.check_device(q)
    return kernels


_kernels: list[Backend] = []  # the backend that runs them, once it is imported


def _import_kernels() -> Backend:
    try:
        from . import triton_backend
    except ImportError as error:
        raise ValueError("backend='triton' needs the triton package, which has wheels for Linux only") from error
    _kernels.append(triton_backend)
    return triton_backend


def autocasted(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs in autocast's dtype, where autocast is on for their device; fp64 and fp8 stay what they are."""
    if not torch._C._is_any_autocast_enabled():
        return inputs
    return tuple(
        x.to(torch.get_autocast_dtype(x.device.type))
        if isinstance(x, Tensor)
        and x.dtype in _AUTOCAST
        and x.device.type != "meta"  # which autocast does not know
        and torch.is_autocast_enabled(x.device.type)
        else x
        for x in inputs
    )
