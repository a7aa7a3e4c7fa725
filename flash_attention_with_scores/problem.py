"""One call of the library: its arguments checked, its backend chosen."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.tiled_forward import Window

from . import pytorch_backend
from .validation import check_attention, check_backend, check_features


class Problem(NamedTuple):
    """Attention to be computed, with valid arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    sm_scale: float | None
    dropout_p: float
    seed: int
    options: dict  # window, softcap, sinks, key_padding_mask
    backend: str

    def run(self, name: str, buffers: dict[str, Tensor] | None = None, **own) -> tuple[Tensor, ...]:
        """Run a function of `stage3_scores_and_sums/launch.py`, or its twin in PyTorch.

        Args:
            name: which one.
            buffers: where results go, by the launch function's names; the kernels write there and allocate nothing.
            own: the function's own arguments.
        """
        attend = (self.q, self.k, self.v, self.causal, self.sm_scale, self.dropout_p, self.seed)
        if self.backend == "triton" and buffers:
            return getattr(kernels("launch"), name)(*attend, **self.options, **own, **buffers)
        module = pytorch_backend if self.backend == "pytorch" else kernels("ops")
        return getattr(module, name)(*attend, **self.options, **own)


def checked_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sm_scale: float | None,
    dropout_p: float,
    seed: int | None,
    backend: str | None,
    *,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    descales: tuple | None = None,
    allow_fp8: bool = False,
) -> Problem:
    """Check the arguments that all functions of attention share; raise TypeError or ValueError.

    A seed of None is drawn from torch's generator where weights are dropped.
    """
    check_attention(q, k, v, causal, sm_scale, dropout_p, seed, allow_fp8=allow_fp8)
    check_features(q, k, window, softcap, sinks, key_padding_mask, descales)
    backend = check_backend(backend, q, k, v, *(() if sinks is None else (sinks,)))
    if seed is None:
        seed = int(torch.randint(2**62, ())) if dropout_p > 0 else 0
    scale = None if sm_scale is None else float(sm_scale)
    options = {"window": window, "softcap": softcap, "sinks": sinks, "key_padding_mask": key_padding_mask}
    return Problem(q, k, v, causal, scale, float(dropout_p), seed, options, backend)


def kernels(module: str) -> ModuleType:
    """Import stage 3's `launch`, `ops` or `column_sums` on first use: the PyTorch backend works without Triton."""
    if module == "launch":
        from stage3_scores_and_sums import launch as found
    elif module == "ops":
        from stage3_scores_and_sums import ops as found
    else:
        from stage3_scores_and_sums import column_sums as found
    return found
