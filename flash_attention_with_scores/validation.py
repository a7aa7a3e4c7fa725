"""Checks of user input: every error names the argument, what was given and what is allowed."""

import inspect
import math
import numbers

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MAX_HEAD_DIM = 256
_BACKENDS = ("triton", "pytorch")


def check_attention(q, k, v, causal, sm_scale, dropout_p, seed, *, allow_fp8: bool = False) -> None:
    """Check the arguments of attention itself; raise TypeError or ValueError."""
    check_qk(q, k, causal, sm_scale, allow_fp8)
    _check_tensor("v", v, allow_fp8)
    _check_like("v", v, "k", k)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, heads and length {list(k.shape[:3])}, got {list(v.shape[:3])}")
    if not 1 <= v.shape[3] <= _MAX_HEAD_DIM:
        raise ValueError(f"v's head dimension must be from 1 to {_MAX_HEAD_DIM}, got {v.shape[3]}")
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int or None, got {type(seed).__name__}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")


def check_features(q, k, window, softcap, sinks, key_padding_mask, descales) -> None:
    """Check what attention does beside the plain formula; raise TypeError or ValueError."""
    check_window(window)
    if softcap is not None:
        check_number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be above 0, got {softcap}")
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            raise TypeError(f"sinks must be a floating-point tensor or None, got {_kind(sinks)}")
        _check_shape("sinks", sinks, (q.shape[1],), q.device)
    check_padding(q, k, key_padding_mask)
    if descales is not None:
        if q.dtype not in _FP8:
            raise ValueError(f"descales go with fp8 inputs only, got {q.dtype}")
        if not isinstance(descales, tuple | list) or len(descales) != 3:
            raise TypeError(f"descales must be three numbers or one-element tensors (q, k, v), got {descales!r}")
        for name, x in zip("qkv", descales, strict=True):
            if isinstance(x, Tensor):
                if x.numel() != 1:
                    raise ValueError(f"descales: {name}'s must have one element, got shape {list(x.shape)}")
            else:
                check_number(f"descales: {name}'s", x)
                if x <= 0:
                    raise ValueError(f"descales: {name}'s must be above 0, got {x}")


def check_padding(q, k, key_padding_mask) -> None:
    """Check a key padding mask: a bool tensor [B, N], or None."""
    if key_padding_mask is None:
        return
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be a bool tensor or None, got {_kind(key_padding_mask)}")
    _check_shape("key_padding_mask", key_padding_mask, (k.shape[0], k.shape[2]), q.device)


def check_split(split, n_k: int) -> None:
    """Check where the cross-token sums cut the sequence: an int in [0, N]."""
    if isinstance(split, bool) or not isinstance(split, int):
        raise TypeError(f"split must be an int, got {type(split).__name__}")
    if not 0 <= split <= n_k:
        raise ValueError(f"split must be in [0, {n_k}], the number of keys, got {split}")


def check_choice(name: str, x, allowed: tuple[str, ...]) -> None:
    """Check that an argument is one of a few strings."""
    if x not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {x!r}")


def check_flag(name: str, x) -> None:
    """Check that an argument is a bool."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be a bool, got {type(x).__name__}")


def check_buffer(name: str, x, shape: tuple[int, ...], dtype: torch.dtype, taken: dict[str, Tensor]) -> None:
    """Check a tensor to write to: its shape, dtype, device and layout, and that it shares no memory with `taken`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    _check_shape(name, x, shape, next(iter(taken.values())).device)
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())}")
    start, stop = _span(x)
    for other_name, other in taken.items():
        other_start, other_stop = _span(other)
        if max(start, other_start) < min(stop, other_stop):
            raise ValueError(f"{name} must not share memory with {other_name}")


def check_cumulative_scores(q: Tensor, k: Tensor, scores) -> None:
    """Check scores of earlier calls: [B, Hk, n] of at most as many keys as there are now, in the sums' dtype."""
    check_qk(q, k, False, None)
    if not isinstance(scores, Tensor):
        raise TypeError(f"cumulative_scores must be a torch.Tensor or None, got {type(scores).__name__}")
    wide = torch.promote_types(q.dtype, torch.float32)
    if scores.dtype != wide:
        raise TypeError(f"cumulative_scores must be {wide}, got {scores.dtype}")
    batch, n_kv_heads, n_k = k.shape[:3]
    if scores.ndim != 3 or scores.shape[:2] != (batch, n_kv_heads) or scores.shape[2] > n_k:
        raise ValueError(
            f"cumulative_scores must have shape [{batch}, {n_kv_heads}, n] with n at most {n_k}, the number of keys, "
            f"got {list(scores.shape)}"
        )
    if scores.device != q.device:
        raise ValueError(f"cumulative_scores must be on q's device {q.device}, got {scores.device}")


def check_fold(name: str, fold, backend: str) -> None:
    """Check a reduction of the user's own: jitted for Triton, a plain function for PyTorch, with five arguments."""
    code = getattr(fold, "fn", None)  # of a @triton.jit function, compiled or interpreted
    if backend == "triton" and code is None:
        raise TypeError(f"{name} must be a @triton.jit function for backend='triton', got {fold!r}")
    if backend == "pytorch" and (code is not None or not callable(fold)):
        raise TypeError(f"{name} must be a plain function of tensors for backend='pytorch', got {fold!r}")
    parameters = list(inspect.signature(code or fold).parameters)
    if len(parameters) != 5:
        raise TypeError(
            f"{name} must take five arguments (acc, logits, weights, q_idx, k_idx), got {len(parameters)}: {parameters}"
        )


def _span(x: Tensor) -> tuple[int, int]:
    """Return the addresses from x's first byte to past its last."""
    if x.numel() == 0:
        return 0, 0
    length = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + length * x.element_size()


def check_window(window) -> None:
    """Check a window: an int, a pair of ints or None, none of them negative."""
    sides = window if isinstance(window, tuple | list) else (window,)
    if len(sides) not in (1, 2) or any(
        x is not None and (isinstance(x, bool) or not isinstance(x, int)) for x in sides
    ):
        raise TypeError(f"window must be an int, a pair (left, right) of ints or None, got {window!r}")
    if any(x is not None and x < 0 for x in sides):
        raise ValueError(f"window must not be negative, got {window!r}")


def check_qk(q, k, causal, sm_scale, allow_fp8: bool = False) -> None:
    """Check the arguments that define the scores; raise TypeError or ValueError."""
    _check_tensor("q", q, allow_fp8)
    _check_tensor("k", k, allow_fp8)
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
        check_number("sm_scale", sm_scale, " or None")


def check_backend(backend, *inputs: Tensor) -> str:
    """Return the backend to use for the inputs; raise where the one asked for cannot run them."""
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    q = inputs[0]
    chosen = backend or ("triton" if q.is_cuda else "pytorch")
    if chosen == "pytorch":
        if q.dtype in _FP8:
            raise ValueError(f"backend='pytorch' takes fp16, bf16, fp32 or fp64, got {q.dtype}")
        return chosen
    if q.dtype == torch.float64:
        raise ValueError("q must be fp16, bf16 or fp32 for backend='triton', got torch.float64; use backend='pytorch'")
    if not q.is_cuda and not _triton_is_interpreted():
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got tensors on {q.device}; "
            "to run kernels in Triton's interpreter, set TRITON_INTERPRET=1 before Python starts"
        )
    return chosen


@torch.compiler.assume_constant_result
def _triton_is_interpreted() -> bool:
    try:
        import triton
    except ImportError as error:
        raise ValueError("backend='triton' needs the triton package, which has wheels for Linux only") from error
    return triton.knobs.runtime.interpret


def check_number(name: str, x, otherwise: str = "") -> None:
    """Check that an argument is a finite number."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be a number{otherwise}, got {type(x).__name__}")
    if not math.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {x.device}")


def _kind(x) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _check_tensor(name: str, x, allow_fp8: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must be 4-D [batch, heads, sequence, head_dim], got shape {list(x.shape)}")
    if x.dtype not in _DTYPES and not (allow_fp8 and x.dtype in _FP8):
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64{' or fp8' if allow_fp8 else ''}, got {x.dtype}")


def _check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")
