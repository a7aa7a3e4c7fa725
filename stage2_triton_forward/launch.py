"""Allocates outputs and launches stage 2's kernels. Inputs are taken as valid: the API checks them."""

import math
from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stage1_pytorch_tiled.philox import drop_threshold

from .forward_kernel import forward_kernel, ignore_logits
from .simple_kernel import simple_forward_kernel
from .tile_config import forward_config, simple_config

_DESCRIPTOR_ALIGNMENT = 16  # bytes: what the hardware asks of a tile's base address and strides


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
    on_logits=ignore_logits,
    hook_args: tuple = (),
    compute_output: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run the forward loop, with a hook on its logits.

    Args:
        q: [B, Hq, M, D] fp16|bf16|fp32, any strides, D ≤ 256.
        k, v: [B, Hk, N, D], Hq a multiple of Hk.
        causal: aligned to the bottom-right corner.
        sm_scale: factor on q·kᵀ; None means 1/sqrt(D).
        dropout_p: probability of dropping a weight, on the output only.
        seed: key of the Philox generator behind dropout.
        on_logits: a `@triton.jit` hook; `ignore_logits` documents its arguments.
        hook_args: tuple handed to the hook.
        compute_output: False leaves v unread and output and lse unwritten; only the hook acts.

    Returns:
        output like q, contiguous; lse [B, Hq, M] fp32. Rows that see no key: 0 and -inf.
    """
    batch, n_heads, n_q, head_dim = q.shape
    n_k = k.shape[2]
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.numel() == 0 or n_k == 0:
        return output.zero_(), lse.fill_(-math.inf)
    config = forward_config(q.dtype, head_dim)
    block_d = padded_head_dim(head_dim)
    aligned_output = describable(output, copy=False)
    with device_of(q):
        forward_kernel[(triton.cdiv(n_q, config.block_m) * batch * n_heads,)](
            descriptor(q, config.block_m, block_d),
            descriptor(k, config.block_n, block_d),
            descriptor(v, config.block_n, block_d),
            descriptor(aligned_output, config.block_m, block_d),
            lse,
            hook_args,
            n_q,
            n_k,
            default_scale(q, sm_scale),
            seed,
            drop_threshold(dropout_p),
            1 / (1 - dropout_p),
            N_HEADS=n_heads,
            GROUP=n_heads // k.shape[1],
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_d,
            IS_CAUSAL=causal,
            HAS_DROPOUT=dropout_p > 0,
            COMPUTE_OUTPUT=compute_output,
            ON_LOGITS=on_logits,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output if aligned_output is output else output.copy_(aligned_output), lse


def descriptor(x: Tensor, block_rows: int, block_d: int) -> TensorDescriptor:
    """Describe [B, H, N, D] for tile loads of [block_rows, block_d] that are clipped at the end of each head."""
    x = describable(x)
    strides = [_free_stride(x) if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, block_rows, block_d])


def describable(x: Tensor, copy: bool = True) -> Tensor:
    """Return x, or a tensor of its shape whose layout a descriptor accepts (a copy of x, or only room for it)."""
    alignment = _DESCRIPTOR_ALIGNMENT // x.element_size()
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
    return _DESCRIPTOR_ALIGNMENT // x.element_size() * math.ceil(x.numel())


def padded_head_dim(head_dim: int) -> int:
    """Return the tile width for a head dimension: a power of two that tl.dot accepts."""
    return max(16, triton.next_power_of_2(head_dim))


def default_scale(q: Tensor, sm_scale: float | None) -> float:
    """Return sm_scale, or 1/sqrt(D) where it is None."""
    return 1 / math.sqrt(q.shape[-1]) if sm_scale is None else float(sm_scale)


def device_of(x: Tensor):
    """Return a context in which x's device is current: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
