"""Checks of user input: every error names the argument, what was given and what is allowed."""

import inspect
import math
import numbers

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import Setting

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MAX_HEAD_DIM = 256
_BACKENDS = ("triton", "pytorch")


def check_attention(q, k, v, setting: Setting, seed, allow_fp8: bool = False) -> None:
    """Check the arguments of attention itself; raise TypeError or ValueError."""
    batch, n_kv_heads, n_k, _ = _check_qk(q, k, allow_fp8)
    if v is not k:
        v_shape = _check_tensor("v", v, allow_fp8)
        _check_like("v", v, "k", k)
        if v_shape[:3] != (batch, n_kv_heads, n_k):
            raise ValueError(f"v must have k's batch, heads and length {list(k.shape[:3])}, got {list(v_shape[:3])}")
        if not 1 <= v_shape[3] <= _MAX_HEAD_DIM:
            raise ValueError(f"v's head dimension must be from 1 to {_MAX_HEAD_DIM}, got {v_shape[3]}")
    check_flag("causal", setting.causal)
    if setting.sm_scale is not None:
        check_number("sm_scale", setting.sm_scale, " or None")
    if setting.dropout_p != 0 or type(setting.dropout_p) is not float:
        check_number("dropout_p", setting.dropout_p)
        if not 0 <= setting.dropout_p < 1:
            raise ValueError(f"dropout_p must be in [0, 1), got {setting.dropout_p}")
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int or None, got {type(seed).__name__}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")


def check_features(q, k, setting: Setting, descales) -> None:
    """Check what attention does beside the plain formula; raise TypeError or ValueError."""
    if setting.window is not None:
        check_window(setting.window)
    if setting.softcap is not None:
        check_number("softcap", setting.softcap)
        if setting.softcap <= 0:
            raise ValueError(f"softcap must be above 0, got {setting.softcap}")
    sinks = setting.sinks
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            raise TypeError(f"sinks must be a floating-point tensor or None, got {_kind(sinks)}")
        _check_shape("sinks", sinks, (q.shape[1],), q.device)
    if setting.key_padding_mask is not None:
        _check_padding(q, k, setting.key_padding_mask)
    if descales is not None:
        _check_descales(q, descales)


def _check_descales(q, descales) -> None:
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


def _check_padding(q, k, key_padding_mask) -> None:
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
    _check_qk(q, k)
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


def check_fold_arguments(name: str, fold) -> None:
    """Check that a function of the caller's takes what a fold is given."""
    parameters = list(inspect.signature(fold).parameters)
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


def _check_qk(q, k, allow_fp8: bool = False) -> torch.Size:
    """Check the tensors that define the scores; return k's shape."""
    batch, n_heads, _, head_dim = _check_tensor("q", q, allow_fp8)
    k_shape = _check_tensor("k", k, allow_fp8)
    _check_like("k", k, "q", q)
    k_batch, n_kv_heads, _, k_head_dim = k_shape
    if k_batch != batch:
        raise ValueError(f"k must have q's batch size {batch}, got {k_batch}")
    if k_head_dim != head_dim:
        raise ValueError(f"k must have q's head dimension {head_dim}, got {k_head_dim}")
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"q's head dimension must be from 1 to {_MAX_HEAD_DIM}, got {head_dim}")
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        raise ValueError(f"q's head count must be a multiple of k's, got {n_heads} and {n_kv_heads}")
    return k_shape


def check_backend(backend, q: Tensor) -> str:
    """Return the name of the backend for q; raise where the one asked for does not take its dtype."""
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    chosen = backend or ("triton" if q.is_cuda else "pytorch")
    if chosen == "pytorch" and q.dtype in _FP8:
        raise ValueError(f"backend='pytorch' takes fp16, bf16, fp32 or fp64, got {q.dtype}")
    if chosen == "triton" and q.dtype == torch.float64:
        raise ValueError("q must be fp16, bf16 or fp32 for backend='triton', got torch.float64; use backend='pytorch'")
    return chosen


def check_number(name: str, x, otherwise: str = "") -> None:
    """Check that an argument is a finite number."""
    if type(x) not in (float, int) and (isinstance(x, bool) or not isinstance(x, numbers.Real)):
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


def _check_tensor(name: str, x, allow_fp8: bool = False) -> torch.Size:
    """Check a tensor by itself; return its shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must be 4-D [batch, heads, sequence, head_dim], got shape {list(shape)}")
    if x.dtype not in _DTYPES and not (allow_fp8 and x.dtype in _FP8):
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64{' or fp8' if allow_fp8 else ''}, got {x.dtype}")
    return shape


def _check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {x.device}")
