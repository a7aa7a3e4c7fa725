"""Allocates outputs and launches stage 2's kernels. Inputs are taken as valid: the API checks them."""

import math
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stage1_pytorch_tiled.philox import drop_threshold
from stage1_pytorch_tiled.tiled_forward import Window, window_sides

from .forward_kernel import Logits, Loop, Tiles, forward_kernel
from .hook import PLAIN, Hook, constant
from .quick_interpreter import quicken
from .simple_kernel import simple_forward_kernel
from .tile_config import TileConfig, forward_config, heads_together, simple_config
from .tiles import Dropout, Mask

if triton.knobs.runtime.interpret:
    quicken()

_DESCRIPTOR_ALIGNMENT = 16  # bytes: what the hardware asks of a tile's base address and strides


class Sides(NamedTuple):
    """Who sees whom: query i sees key j iff -right <= i + offset - j <= left; None for no bound."""

    left: int | None
    right: int | None
    offset: int  # N - M: query i stands at key i + offset, the last query at the last key


def simple_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, sm_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Run the teaching kernel, with 64×64 tiles for all but the widest rows.

    Args:
        q: [B, Hq, M, D] or [B, M, D] fp16|bf16|fp32, any strides, D ≤ 256.
        k, v: [B, Hk, N, D] or [B, N, D], Hq a multiple of Hk.
        causal: aligned to the bottom-right corner.
        sm_scale: factor on q·kᵀ; None means 1/sqrt(D).

    Returns:
        output like q; lse, q's shape without the last dimension, fp32. Rows that see no key: 0 and -inf.
    """
    if q.ndim == 3:
        output, lse = simple_forward(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), causal, sm_scale)
        return output.squeeze(1), lse.squeeze(1)
    batch, n_heads, n_q, head_dim = q.shape
    output = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return output, lse
    block_d = padded_head_dim(head_dim)
    config = simple_config(q.dtype, block_d)
    with device_of(q):
        simple_forward_kernel[(triton.cdiv(n_q, config.block_m), batch * n_heads)](
            q,
            k,
            v,
            output,
            lse,
            q.stride(),
            k.stride(),
            v.stride(),
            output.stride(),
            n_q,
            k.shape[2],
            default_scale(q, sm_scale),
            N_HEADS=n_heads,
            GROUP=n_heads // k.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            IS_CAUSAL=causal,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output, lse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    *,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    descale: Tensor | None = None,
    hook: Hook = PLAIN,
    hook_tensor: Tensor | None = None,
    compute_output: bool = True,
    n_splits: int = 1,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward loop, with a hook on its logits.

    Args:
        q: [B, Hq, M, D] fp16|bf16|fp32|fp8 (e4m3, e5m2), any strides, D ≤ 256.
        k: [B, Hk, N, D], Hq a multiple of Hk.
        v: [B, Hk, N, Dv].
        causal: aligned to the bottom-right corner.
        sm_scale: factor on q·kᵀ; None means 1/sqrt(D).
        dropout_p: probability of dropping a weight, on the output only.
        seed: key of the Philox generator behind dropout.
        window: w for |i + N - M - j| <= w, or (left, right) with None for unbounded.
        softcap: logits become softcap·tanh(logits / softcap).
        sinks: [Hq], one extra logit per head that takes part in the denominator only.
        key_padding_mask: [B, N] bool, True for a real key.
        descale: [2] fp32, factors on q·kᵀ and on v.
        hook: what to do with logits and weights beside attention; see `make_hook`.
        hook_tensor: [B, H, rows, columns], of which the hook gets a descriptor for tiles of BLOCK_M × BLOCK_N.
        compute_output: False leaves v unread and output and lse unwritten; only the hook acts.
        n_splits: into how many parts the keys are cut, each walked by a program of its own.
        out, lse: contiguous, where to; None for new ones.

    Returns:
        output [B, Hq, M, Dv] in q's dtype (bf16 for fp8) and lse [B, Hq, M] fp32; rows that see no key hold 0 and -inf.
        With n_splits > 1, both in fp32 with a leading dimension for the splits, to be merged by lse.
    """
    batch, n_heads, n_q, _ = q.shape
    n_k, head_dim_v = k.shape[2], v.shape[3]
    splits = (n_splits,) if n_splits > 1 else ()
    out_dtype = torch.float32 if splits else output_dtype(q)
    rows = (*splits, batch, n_heads, n_q)
    output = torch.empty(*rows, head_dim_v, dtype=out_dtype, device=q.device) if out is None else out
    lse = torch.empty(rows, dtype=torch.float32, device=q.device) if lse is None else lse
    if output.numel() == 0 or n_k == 0:
        return output.zero_(), lse.fill_(-math.inf)

    mask = key_mask(n_q, n_k, causal, window, key_padding_mask, placeholder=lse)
    guarded = mask.HAS_LEFT.value or mask.HAS_PADDING.value or softcap is not None or hook is not PLAIN
    storing = hook_tensor is not None
    config = forward_config(q, head_dim_v, guarded, dropout_p > 0, storing and compute_output)
    tiles = describe_tiles(q, k, head_dim_v, config)
    to_logits = describe_logits(default_scale(q, sm_scale), softcap, config.fp32_precision)
    flat_output = output.view(-1, n_heads, n_q, head_dim_v)
    aligned_output = describable(flat_output, copy=False)
    out_desc = descriptor(aligned_output, config.block_m, tiles.BLOCK_DV.value)
    m_blocks = triton.cdiv(n_q, config.block_m)
    with device_of(q):
        forward_kernel[(m_blocks * batch * n_heads, n_splits)](
            descriptor(signed(q, sm_scale), config.block_m),
            descriptor(k, config.block_n),
            descriptor(v, config.block_n),
            out_desc,
            lse,
            readable(sinks, lse),
            readable(descale, lse),
            out_desc if hook_tensor is None else descriptor(hook_tensor, config.block_m, config.block_n),
            Loop(mask, to_logits, describe_dropout(seed, dropout_p), tiles),
            hook,
            batch,
            heads_together(k, v, n_heads, batch, mask.HAS_RIGHT.value or mask.HAS_LEFT.value, storing),
            N_HEADS=n_heads,
            N_SPLITS=n_splits,
            HAS_TAIL=mask.HAS_RIGHT.value or n_k % config.block_n != 0,
            HAS_SINKS=sinks is not None,
            HAS_DESCALE=descale is not None,
            COMPUTE_OUTPUT=compute_output,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if aligned_output is not flat_output:
        flat_output.copy_(aligned_output)
    return output, lse


def key_mask(
    n_q: int, n_k: int, causal: bool, window: Window, key_padding_mask: Tensor | None, placeholder: Tensor
) -> Mask:
    """Describe who sees whom for the kernels; `placeholder` is any tensor, for a pointer that is never read."""
    left, right, offset = mask_sides(n_q, n_k, causal, window)
    padded = key_padding_mask is not None
    return Mask(
        n_q,
        n_k,
        offset,
        left or 0,
        right or 0,
        readable(key_padding_mask, placeholder, torch.uint8),
        *map(constant, (left is not None, right is not None, padded)),
    )


def readable(x: Tensor | None, placeholder: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return what a kernel reads through a bare pointer, which knows nothing of strides: x, contiguous.

    Args:
        x: any strides; None where the kernel reads nothing.
        placeholder: any tensor, for a pointer that is never read.
        dtype: what x is converted to; None leaves it.
    """
    if x is None:
        return placeholder
    return (x if dtype is None else x.to(dtype)).contiguous()


def mask_sides(n_q: int, n_k: int, causal: bool, window: Window) -> Sides:
    """Return how far a query sees to either side of where it stands."""
    left, right = window_sides(window)
    if causal:
        right = 0 if right is None else min(right, 0)
    farthest = n_q + n_k  # no key lies farther from a query; a larger bound could overflow 32 bits
    return Sides(*(None if side is None else min(side, farthest) for side in (left, right)), offset=n_k - n_q)


def describe_logits(sm_scale: float, softcap: float | None, fp32_precision: str) -> Logits:
    """Describe how q·kᵀ becomes logits for the kernels, whose q has the sign of the scale; see `signed`."""
    cap = 1.0 if softcap is None else softcap
    return Logits(abs(sm_scale) or 1.0, cap, *map(constant, (softcap is not None, fp32_precision)))


def signed(x: Tensor, sm_scale: float | None) -> Tensor:
    """Return x times the sign of the scale (0 for a scale of 0): kernels take a row's max before they scale.

    It is done here because Triton 3.6 computes wrong products, in loops without a mask, from a tile changed in between.
    """
    if sm_scale is None or sm_scale > 0:
        return x
    return (x.float() * (-1.0 if sm_scale < 0 else 0.0)).to(x.dtype)


def describe_tiles(q: Tensor, k: Tensor, head_dim_v: int, config: TileConfig) -> Tiles:
    """Describe the tiles of q, k and values of width `head_dim_v` for the kernels."""
    widths = (padded_head_dim(width, q.dtype) for width in (q.shape[3], head_dim_v))
    return Tiles(*map(constant, (q.shape[1] // k.shape[1], config.block_m, config.block_n, *widths)))


def describe_dropout(seed: int, dropout_p: float) -> Dropout:
    """Describe which weights are dropped for the kernels."""
    return Dropout(seed, drop_threshold(dropout_p), 1 / (1 - dropout_p), constant(dropout_p > 0))


def descriptor(x: Tensor, block_rows: int, block_d: int | None = None) -> TensorDescriptor:
    """Describe [B, H, N, D] for tiles of `block_rows` rows of all columns, clipped at the end of each head."""
    x = describable(x)
    strides = x.stride()
    if 1 in x.shape:
        strides = [_free_stride(x) if size == 1 else step for size, step in zip(x.shape, strides, strict=True)]
    block_d = block_d or padded_head_dim(x.shape[3], x.dtype)
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, block_rows, block_d])


def describable(x: Tensor, copy: bool = True) -> Tensor:
    """Return x, or a tensor of its shape whose layout a descriptor accepts (a copy of x, or only room for it)."""
    alignment = _DESCRIPTOR_ALIGNMENT // x.element_size()
    if x.is_contiguous() and x.shape[3] % alignment == 0 and x.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0:
        return x  # the usual case, found out fast
    outer = [step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    last_is_dense = x.stride(3) == 1 or x.shape[3] == 1
    strides_fit = all(step > 0 and step % alignment == 0 for step in outer)
    if last_is_dense and strides_fit and x.data_ptr() % _DESCRIPTOR_ALIGNMENT == 0:
        return x
    padded_dim = math.ceil(x.shape[3] / alignment) * alignment
    room = torch.empty(*x.shape[:3], padded_dim, dtype=x.dtype, device=x.device)[..., : x.shape[3]]
    return room.copy_(x) if copy else room


def _free_stride(x: Tensor) -> int:
    """Return a legal stride for a dimension of size 1, whose own stride may be anything."""
    return _DESCRIPTOR_ALIGNMENT // x.element_size() * x.numel()


@cache
def padded_head_dim(head_dim: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the tile width for a head dimension: a power of two that tl.dot accepts (from 32 on for fp8)."""
    return max(32 if dtype.itemsize == 1 else 16, triton.next_power_of_2(head_dim))


def output_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of q's attention: its own, bf16 for fp8."""
    return torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype


def default_scale(q: Tensor, sm_scale: float | None) -> float:
    """Return sm_scale, or 1/sqrt(D) where it is None."""
    return 1 / math.sqrt(q.shape[-1]) if sm_scale is None else float(sm_scale)


def device_of(x: Tensor):
    """Return a context in which x's device is current: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
