"""Proof that nothing N×N was made: watches every tensor that PyTorch allocates during a call."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the largest storage, in bytes, of any tensor produced inside the `with` block.

    Counting storage and not shape lets a view or an expanded tensor cost only the memory behind it. Tiles inside a
    Triton kernel live in registers and shared memory, and never show up here.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise PyTorch imports its compiler at the first tensor, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result
