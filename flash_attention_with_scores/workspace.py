"""Buffers that calls of the same shape share, for `reuse_buffers=True`."""

import torch
from torch import Tensor

_buffers: dict[tuple, Tensor] = {}


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the buffer of this name, shape and dtype: the same at every call, with what the last call left in it.

    Each device and CUDA stream has buffers of its own. While a CUDA graph is captured a new tensor is returned, from
    the graph's own memory: a graph reuses that at every replay, and nothing outside can overwrite it.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else None
    key = (name, tuple(shape), dtype, device, stream)
    if key not in _buffers:
        _buffers[key] = torch.empty(shape, dtype=dtype, device=device)
    return _buffers[key]


def release_buffers() -> None:
    """Free all shared buffers; tensors that earlier calls returned keep theirs alive."""
    _buffers.clear()
