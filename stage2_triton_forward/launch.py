"""Allocates outputs and launches stage 2's kernels. Inputs are taken as valid: the API checks them."""

import math

import torch
from torch import Tensor
from triton import knobs

from stage1_pytorch_tiled.setting import FULL, Setting
from stage1_pytorch_tiled.visibility import visible_sides

from .describe import (
    describable,
    describe_loop,
    descriptor,
    output_dtype,
    padded_head_dim,
    readable,
    signed,
)
from .forward_kernel import forward_kernel
from .hook import PLAIN, Hook
from .launcher import launch
from .quick_interpreter import quicken
from .simple_kernel import simple_forward_kernel
from .tile_config import TileConfig, cdiv, forward_config, heads_together, simple_config

if knobs.runtime.interpret:
    quicken()


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
    launch(
        simple_forward_kernel,
        (cdiv(n_q, config.block_m), batch * n_heads),
        config,
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
        Setting(sm_scale=sm_scale).scale(head_dim),
        N_HEADS=n_heads,
        GROUP=n_heads // k.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        IS_CAUSAL=causal,
    )
    return output, lse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting = FULL,
    *,
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
        setting: mask, scale, dropout and the like.
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
    output = q.new_empty((*rows, head_dim_v), dtype=out_dtype) if out is None else out
    lse = q.new_empty(rows, dtype=torch.float32) if lse is None else lse
    if output.numel() == 0 or n_k == 0:
        return output.zero_(), lse.fill_(-math.inf)

    left, right = visible_sides(setting.causal, setting.window)
    storing = hook_tensor is not None
    config = config_of(q, v, setting, hook, storing and compute_output)
    rows_differ = left is not None or right is not None
    block_dv = padded_head_dim(head_dim_v, q.dtype)
    flat_output = output.view(-1, n_heads, n_q, head_dim_v) if splits else output
    aligned_output = describable(flat_output)
    out_desc = descriptor(aligned_output, config.block_m, block_dv)
    launch(
        forward_kernel,
        (cdiv(n_q, config.block_m) * batch * n_heads, n_splits),
        config,
        descriptor(signed(q, setting), config.block_m),
        descriptor(k, config.block_n),
        descriptor(v, config.block_n),
        out_desc,
        lse,
        readable(setting.sinks),
        readable(setting.descale),
        out_desc if hook_tensor is None else descriptor(hook_tensor, config.block_m, config.block_n),
        describe_loop(q, k, head_dim_v, setting, config),
        hook,
        batch,
        heads_together(k, v, n_heads, batch, rows_differ, storing),
        N_HEADS=n_heads,
        N_SPLITS=n_splits,
        HAS_TAIL=right is not None or n_k % config.block_n != 0,
        HAS_SINKS=setting.sinks is not None,
        HAS_DESCALE=setting.descale is not None,
        COMPUTE_OUTPUT=compute_output,
    )
    if aligned_output is not flat_output:
        flat_output.copy_(aligned_output)
    return output, lse


def config_of(q: Tensor, v: Tensor, setting: Setting, hook: Hook = PLAIN, storing: bool = False) -> TileConfig:
    """Return the config that the forward loop takes for a call.

    Args:
        q, v, setting, hook: the call's.
        storing: whether the hook stores every tile of logits, beside an output.
    """
    left, _ = visible_sides(setting.causal, setting.window)
    at_every_tile = hook.ON_LOGITS is not PLAIN.ON_LOGITS or hook.ON_WEIGHTS is not PLAIN.ON_WEIGHTS
    guarded = left is not None or setting.key_padding_mask is not None or setting.softcap is not None or at_every_tile
    return forward_config(q, v.shape[3], guarded, setting.dropout_p > 0, storing)
