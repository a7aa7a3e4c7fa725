"""The most memory that a call holds at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark.measure import n_bytes


class LiveTensors(TorchDispatchMode):
    """Adds up the storage of all tensors that operations inside the `with` block made and that are still alive.

    What an operation allocates and frees within itself is not seen: on a CPU nothing reports it.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.foreign: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.alive:
                self.foreign.add(x.untyped_storage()._cdata)  # was there before
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                storage = x.untyped_storage()
                if storage._cdata not in self.foreign:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def bytes_beyond(call: Callable[[], tuple[Tensor, ...]], device: str) -> int:
    """Return the most bytes that a call holds beyond what was there before and what it returns."""
    if device == "cpu":
        with LiveTensors() as live:
            results = call()
        return max(0, live.peak - _distinct_bytes(results))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - _distinct_bytes(results))


def _distinct_bytes(tensors: tuple[Tensor, ...]) -> int:
    """Return the bytes of tensors that do not share memory."""
    return n_bytes(*{x.data_ptr(): x for x in tensors}.values())
