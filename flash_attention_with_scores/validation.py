"""Checks of user input: every error names the argument, what was given and what is allowed."""

import math
import numbers

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_HEAD_DIM = 256
_BACKENDS = ("triton", "pytorch")


def check_attention(q, k, v, causal, sm_scale, dropout_p, seed) -> None:
    """Check the arguments of attention itself; raise TypeError or ValueError."""
    check_qk(q, k, causal, sm_scale)
    _check_tensor("v", v)
    _check_like("v", v, "k", k)
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int or None, got {type(seed).__name__}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")


def check_qk(q, k, causal, sm_scale) -> None:
    """Check the arguments that define the scores; raise TypeError or ValueError."""
    _check_tensor("q", q)
    _check_tensor("k", k)
    _check_like("k", k, "q", q)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch size {q.shape[0]}, got {k.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head dimension {q.shape[3]}, got {k.shape[3]}")
    if not 1 <= q.shape[3] <= _MAX_HEAD_DIM:
        raise ValueError(f"q's head dimension must be from 1 to {_MAX_HEAD_DIM}, got {q.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q's head count must be a multiple of k's, got {q.shape[1]} and {k.shape[1]}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if sm_scale is not None:
        if isinstance(sm_scale, bool) or not isinstance(sm_scale, numbers.Real):
            raise TypeError(f"sm_scale must be a number or None, got {type(sm_scale).__name__}")
        if not math.isfinite(sm_scale):
            raise ValueError(f"sm_scale must be finite, got {sm_scale}")


def check_backend(backend, *inputs: Tensor) -> str:
    """Return the backend to use for the inputs; raise where the one asked for cannot run them."""
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    q = inputs[0]
    chosen = backend or ("triton" if q.is_cuda else "pytorch")
    if chosen == "pytorch":
        return chosen
    if q.dtype == torch.float64:
        raise ValueError("q must be fp16, bf16 or fp32 for backend='triton', got torch.float64; use backend='pytorch'")
    if not q.is_cuda and not _triton_is_interpreted():
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got tensors on {q.device}; "
            "to run kernels in Triton's interpreter, set TRITON_INTERPRET=1 before Python starts"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise NotImplementedError(
            "backend='triton' has no backward pass yet: call it under torch.no_grad(), or use backend='pytorch'"
        )
    return chosen


def _triton_is_interpreted() -> bool:
    try:
        import triton
    except ImportError as error:
        raise ValueError("backend='triton' needs the triton package, which has wheels for Linux only") from error
    return triton.knobs.runtime.interpret


def _check_tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be 4-D [batch, heads, sequence, head_dim], got shape {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {x.dtype}")


def _check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")
