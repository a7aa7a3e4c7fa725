"""Allocates gradients and launches the backward kernels. Inputs are taken as valid."""

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import FULL, Setting
from stage1_pytorch_tiled.visibility import visible_sides
from stage2_triton_forward.describe import (
    describable,
    describe_logits,
    describe_loop,
    descriptor,
    padded_head_dim,
    readable,
    signed,
)
from stage2_triton_forward.hook import constant
from stage2_triton_forward.launch import forward
from stage2_triton_forward.launcher import launch
from stage2_triton_forward.replay import replayed
from stage2_triton_forward.tile_config import cdiv
from stage3_scores_and_sums.column_sum_kernel import Region
from stage3_scores_and_sums.launch import fold_rows, second_pass

from .delta_kernel import delta_kernel
from .grad_kv_kernel import grad_kv_kernel
from .grad_q_kernel import grad_q_kernel
from .grad_tiles import ScoreGrads, add_entropy_slope
from .gradients import Gradients
from .hooks import COLUMN_GRADS, ColumnGrads
from .linear_grads import linear_col_sum_grads, linear_row_sum_grads
from .recompute_pytorch import grad_of_sinks
from .tile_config import backward_configs, delta_config


@replayed
def backward(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, grads: Gradients, setting: Setting = FULL
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of attention by recomputing its weights, tile by tile, from the lse.

    Args:
        q, k, v, setting: as in the forward pass.
        output: [B, Hq, M, Dv], lse: [B, Hq, M] fp32: its results.
        grads: of all that it returned, any strides.

    Returns:
        gradients of q, k and v in their dtypes, and of sinks (None without); 0 for rows that see nothing.

    Source: FlashAttention-2 (Dao 2023), Algorithm 2.
    """
    if q.dtype.itemsize == 1:
        raise NotImplementedError("attention on fp8 inputs has no backward pass")
    grad_q, grad_k, grad_v, grad_sinks = _recompute(q, k, v, output, lse, grads, setting)
    if grads.row_sum is not None:
        more_q, more_k = linear_row_sum_grads(q, k, grads.row_sum, setting)
        grad_q, grad_k = (grad_q + more_q).to(q.dtype), (grad_k + more_k).to(k.dtype)
    if grads.col_sum is not None:
        more_q, more_k = linear_col_sum_grads(q, k, grads.col_sum, setting, q_begin=grads.q_begin)
        grad_q, grad_k = (grad_q + more_q).to(q.dtype), (grad_k + more_k).to(k.dtype)
    return grad_q, grad_k, grad_v, grad_sinks


def _recompute(q, k, v, output, lse, grads, setting) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute what comes through the weights and single scores; sums of raw scores need no weights."""
    batch, n_heads, n_q, _ = q.shape
    n_kv_heads, n_k = k.shape[1:3]
    results = [x.new_empty(x.shape) for x in (q, k, v)]
    through = (grads.output, grads.lse, grads.scores, grads.softmax_col_sum, grads.entropy)
    if q.numel() == 0 or k.numel() == 0 or all(x is None for x in through):
        return *(x.zero_() for x in results), None if setting.sinks is None else torch.zeros_like(setting.sinks)
    lse = readable(lse)
    grad_output = torch.zeros_like(output) if grads.output is None else grads.output
    configs = backward_configs(q, v.shape[3])
    score_grads = describe_score_grads(q, grads)
    extra = None if grads.lse is None else -grads.lse.float()
    if grads.softmax_col_sum is not None:
        columns = through_columns(q, k, lse, score_grads, setting)
        extra = columns if extra is None else extra + columns
    if grads.entropy is not None:
        slopes = grads.entropy.float() * fold_rows(q, k, lse, setting, add_entropy_slope)
        extra = slopes if extra is None else extra + slopes
    delta = _delta(output, grad_output, extra, configs.grad_q.block_m)
    q = signed(q, setting)
    left, right = visible_sides(setting.causal, setting.window)
    aligned = [describable(x) for x in results]
    config = configs.grad_q
    launch(
        grad_q_kernel,
        (batch * n_heads, cdiv(n_q, config.block_m)),
        config,
        descriptor(q, config.block_m),
        descriptor(k, config.block_n),
        descriptor(v, config.block_n),
        descriptor(grad_output, config.block_m),
        descriptor(aligned[0], config.block_m),
        lse,
        delta,
        describe_loop(q, k, v.shape[3], setting, config),
        score_grads,
        N_HEADS=n_heads,
        HAS_TAIL=right is not None or n_k % config.block_n != 0,
    )
    config = configs.grad_kv
    launch(
        grad_kv_kernel,
        (batch * n_kv_heads, cdiv(n_k, config.block_n)),
        config,
        descriptor(q, config.block_m),
        descriptor(k, config.block_n),
        descriptor(v, config.block_n),
        descriptor(grad_output, config.block_m),
        descriptor(aligned[1], config.block_n),
        descriptor(aligned[2], config.block_n),
        lse,
        delta,
        describe_loop(q, k, v.shape[3], setting, config),
        score_grads,
        Region(0, n_q, n_k),
        N_HEADS=n_heads,
        HAS_TAIL=left is not None or n_q % config.block_m != 0,
    )
    aligned[0] = signed(aligned[0], setting)  # dQ is a sum of keys, which do not have the scale's sign
    for grad, filled in zip(results, aligned, strict=True):
        if filled is not grad:
            grad.copy_(filled)
    return *results, None if setting.sinks is None else grad_of_sinks(setting.sinks, lse, delta)


def _delta(output: Tensor, grad_output: Tensor, extra: Tensor | None, block_m: int) -> Tensor:
    """Return rowsum(dO ∘ O) + extra, [B, Hq, M] fp32."""
    batch, n_heads, n_q, head_dim_v = output.shape
    delta = output.new_empty(output.shape[:3], dtype=torch.float32)
    launch(
        delta_kernel,
        (cdiv(n_q, block_m), batch * n_heads),
        delta_config(),
        descriptor(output, block_m),
        descriptor(grad_output, block_m),
        readable(extra),
        delta,
        n_q,
        N_HEADS=n_heads,
        BLOCK_M=block_m,
        BLOCK_DV=padded_head_dim(head_dim_v),
        HAS_EXTRA=extra is not None,
    )
    return delta


def describe_score_grads(q: Tensor, grads: Gradients) -> ScoreGrads:
    """Describe the gradients of scores, of softmax column sums and of entropies for the kernels."""
    columns, q_stop = grads.softmax_col_sum, q.shape[2] if grads.q_stop is None else grads.q_stop
    n_columns, k_stop = (q.shape[1], 0) if columns is None else columns.shape[1:]
    constants = (q.shape[1] // n_columns, grads.scores is not None, columns is not None, grads.entropy is not None)
    pointers = (readable(grads.scores), *(readable(x, torch.float32) for x in (columns, grads.entropy)))
    return ScoreGrads(*pointers, grads.q_begin, q_stop, k_stop, *map(constant, constants))


def through_columns(q: Tensor, k: Tensor, lse: Tensor, score_grads: ScoreGrads, setting: Setting) -> Tensor:
    """Return Σ_j P_ij·g_j, [B, Hq, M], for the gradient g of column sums: one more walk along the keys."""
    result = torch.zeros_like(lse)
    capping = describe_logits(1.0, setting.softcap, "ieee")
    args = ColumnGrads(lse, result, capping, score_grads, constant(None))
    forward(q, k, k, second_pass(setting), hook=COLUMN_GRADS.given(args), compute_output=False)
    return result
