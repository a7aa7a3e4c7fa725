"""Allocates gradients and launches the backward kernels. Inputs are taken as valid."""

import torch
import triton
from torch import Tensor

from stage1_pytorch_tiled.tiled_forward import Window
from stage2_triton_forward.forward_kernel import Loop
from stage2_triton_forward.hook import constant
from stage2_triton_forward.launch import (
    default_scale,
    describable,
    describe_dropout,
    describe_logits,
    describe_tiles,
    descriptor,
    device_of,
    forward,
    key_mask,
    padded_head_dim,
    readable,
    signed,
)
from stage3_scores_and_sums.column_sum_kernel import Region

from .delta_kernel import delta_kernel
from .grad_kv_kernel import grad_kv_kernel
from .grad_q_kernel import grad_q_kernel
from .grad_tiles import ScoreGrads
from .gradients import Gradients
from .hooks import COLUMN_GRADS, ColumnGrads
from .recompute_pytorch import grad_of_sinks
from .tile_config import backward_configs


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    grads: Gradients,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    *,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of attention by recomputing its weights, tile by tile, from the lse.

    Args:
        q, k, v, causal, sm_scale, dropout_p, seed, window, softcap, sinks, key_padding_mask: as in the forward pass.
        output: [B, Hq, M, Dv], lse: [B, Hq, M] fp32: its results.
        grads: of output, lse, scores and softmax column sums, any strides; those of raw sums are `linear_grads.py`'s.

    Returns:
        gradients of q, k and v in their dtypes, and of sinks (None without); 0 for rows that see nothing.

    Source: FlashAttention-2 (Dao 2023), Algorithm 2.
    """
    batch, n_heads, n_q, _ = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    if q.numel() == 0 or k.numel() == 0:
        return *(x.zero_() for x in results), None if sinks is None else torch.zeros_like(sinks)
    lse = readable(lse, lse)
    grad_output = torch.zeros_like(output) if grads.output is None else grads.output
    configs = backward_configs(q, v.shape[3])
    mask = key_mask(n_q, n_k, causal, window, key_padding_mask, placeholder=lse)
    to_logits = describe_logits(default_scale(q, sm_scale), softcap, configs.grad_q.fp32_precision)
    dropout = describe_dropout(seed, dropout_p)
    score_grads = describe_score_grads(q, grads, placeholder=lse)
    extra = None if grads.lse is None else -grads.lse.float()
    if grads.softmax_col_sum is not None:
        masks = {"window": window, "softcap": softcap, "key_padding_mask": key_padding_mask}
        columns = through_columns(q, k, lse, score_grads, causal, sm_scale, **masks)
        extra = columns if extra is None else extra + columns
    delta = _delta(output, grad_output, extra, configs.grad_q.block_m)
    q = signed(q, sm_scale)
    aligned = [describable(x, copy=False) for x in results]
    with device_of(q):
        config = configs.grad_q
        grad_q_kernel[(batch * n_heads, triton.cdiv(n_q, config.block_m))](
            descriptor(q, config.block_m),
            descriptor(k, config.block_n),
            descriptor(v, config.block_n),
            descriptor(grad_output, config.block_m),
            descriptor(aligned[0], config.block_m),
            lse,
            delta,
            Loop(mask, to_logits, dropout, describe_tiles(q, k, v.shape[3], config)),
            score_grads,
            N_HEADS=n_heads,
            HAS_TAIL=mask.HAS_RIGHT.value or n_k % config.block_n != 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        config = configs.grad_kv
        grad_kv_kernel[(batch * n_kv_heads, triton.cdiv(n_k, config.block_n))](
            descriptor(q, config.block_m),
            descriptor(k, config.block_n),
            descriptor(v, config.block_n),
            descriptor(grad_output, config.block_m),
            descriptor(aligned[1], config.block_n),
            descriptor(aligned[2], config.block_n),
            lse,
            delta,
            Loop(mask, to_logits, dropout, describe_tiles(q, k, v.shape[3], config)),
            score_grads,
            Region(0, n_q, n_k),
            N_HEADS=n_heads,
            HAS_TAIL=mask.HAS_LEFT.value or n_q % config.block_m != 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    aligned[0] = signed(aligned[0], sm_scale)  # dQ is a sum of keys, which do not have the scale's sign
    for grad, filled in zip(results, aligned, strict=True):
        if filled is not grad:
            grad.copy_(filled)
    return *results, None if sinks is None else grad_of_sinks(sinks, lse, delta)


def _delta(output: Tensor, grad_output: Tensor, extra: Tensor | None, block_m: int) -> Tensor:
    """Return rowsum(dO ∘ O) + extra, [B, Hq, M] fp32."""
    batch, n_heads, n_q, head_dim_v = output.shape
    delta = torch.empty(output.shape[:3], dtype=torch.float32, device=output.device)
    with device_of(output):
        delta_kernel[(triton.cdiv(n_q, block_m), batch * n_heads)](
            descriptor(output, block_m),
            descriptor(grad_output, block_m),
            readable(extra, delta),
            delta,
            n_q,
            N_HEADS=n_heads,
            BLOCK_M=block_m,
            BLOCK_DV=padded_head_dim(head_dim_v),
            HAS_EXTRA=extra is not None,
        )
    return delta


def describe_score_grads(q: Tensor, grads: Gradients, placeholder: Tensor) -> ScoreGrads:
    """Describe the gradients of scores and of softmax column sums for the kernels."""
    columns, q_stop = grads.softmax_col_sum, q.shape[2] if grads.q_stop is None else grads.q_stop
    has_columns, has_scores = columns is not None, grads.scores is not None
    columns = readable(columns, placeholder, torch.float32)
    scores = readable(grads.scores, placeholder)
    constants = (q.shape[1] // columns.shape[1], has_scores, has_columns)
    return ScoreGrads(scores, columns, grads.q_begin, q_stop, columns.shape[2], *map(constant, constants))


def through_columns(q, k, lse, score_grads, causal=False, sm_scale=None, *, softcap=None, **masks) -> Tensor:
    """Return Σ_j P_ij·g_j, [B, Hq, M], for the gradient g of column sums: one more walk along the keys."""
    result = torch.zeros_like(lse)
    args = ColumnGrads(lse, result, describe_logits(1.0, softcap, "ieee"), score_grads, constant(None))
    forward(q, k, k, causal, sm_scale, hook=COLUMN_GRADS.given(args), compute_output=False, **masks)
    return result
