"""Sums of softmax weights down the columns: a second pass, because a weight needs its row's final normaliser."""

import torch
import triton
from torch import Tensor

from stage1_pytorch_tiled.setting import FULL, Setting
from stage1_pytorch_tiled.visibility import visible_sides
from stage2_triton_forward.describe import describe_loop, descriptor, readable, signed
from stage2_triton_forward.launcher import launch
from stage2_triton_forward.split_kv import one_query
from stage2_triton_forward.tile_config import cdiv

from .column_sum_kernel import Region, column_sum_kernel
from .hooks import add_weights
from .tile_config import column_sum_config, heads_of_a_program


def softmax_col_sum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    setting: Setting = FULL,
    *,
    q_begin: int = 0,
    q_stop: int | None = None,
    k_stop: int | None = None,
    per_query_head: bool = False,
    stored: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum each key's softmax weight over the queries.

    Args: as in `fold_columns`.

    Returns:
        [B, Hk, k_stop] fp32, or [B, Hq, k_stop] with per_query_head.
    """
    left, _ = visible_sides(setting.causal, setting.window)
    is_whole = q.shape[2] == 1 and q_begin == 0 and q_stop in (1, None) and left is None
    if is_whole and stored is None and not per_query_head:
        q, k, _, setting, _ = one_query(q, k, k, setting)  # the heads of a group are the rows of a tile
        lse, q_stop = lse.view(q.shape[:3]), q.shape[2]
    region = {"q_begin": q_begin, "q_stop": q_stop, "k_stop": k_stop, "per_query_head": per_query_head}
    return fold_columns(q, k, lse, setting, add_weights, 0.0, **region, additive=True, stored=stored, out=out)


def fold_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    setting: Setting,
    fold: triton.JITFunction,
    start: float = 0.0,
    *,
    q_begin: int = 0,
    q_stop: int | None = None,
    k_stop: int | None = None,
    per_query_head: bool = False,
    additive: bool = False,
    stored: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Fold the columns of logits and weights, with each key tile in the hands of one program.

    Args:
        q, k, setting: as in the forward pass; its sinks are in the lse.
        lse: [B, Hq, M] fp32, from the forward pass on the same inputs.
        fold: `@triton.jit` (acc, logits, weights, q_idx, k_idx) -> acc, see `hooks.add_weights`.
        start: what acc starts with.
        q_begin, q_stop, k_stop: count queries q_begin to q_stop and keys before k_stop only; None for all.
        per_query_head: fold each query head apart, and not those of a group into one.
        additive: whether the folds of several heads may be added up, so that each can have programs of its own.
        stored: [B, Hq, q_stop - q_begin, k_stop], the scores of that region, read instead of computed again.
        out: [B, Hk, k_stop] fp32 (or Hq), where to.

    Returns:
        out.
    """
    batch, n_heads, n_q, _ = q.shape
    n_kv_heads, n_k = k.shape[1], k.shape[2]
    group = n_heads // n_kv_heads
    q_stop, k_stop = n_q if q_stop is None else q_stop, n_k if k_stop is None else k_stop
    config = column_sum_config(q)
    n_tiles = cdiv(k_stop, config.block_n)
    heads = 1 if per_query_head else group
    if additive:
        heads = min(
            heads, heads_of_a_program(group, batch * n_kv_heads * n_tiles, cdiv(q_stop - q_begin, config.block_m))
        )
    shape = (batch, n_heads if per_query_head else n_kv_heads, k_stop)
    out = q.new_empty(shape, dtype=torch.float32) if out is None else out
    if out.numel() == 0 or q_begin >= q_stop:
        return out.fill_(start)
    parts = out if heads == group or per_query_head else out.new_empty(batch, n_heads, k_stop)
    left, _ = visible_sides(setting.causal, setting.window)
    launch(
        column_sum_kernel,
        (batch * n_heads // heads, n_tiles),
        config,
        descriptor(signed(q, setting), config.block_m),
        descriptor(k, config.block_n),
        readable(lse),
        readable(stored),
        parts,
        describe_loop(q, k, q.shape[3], setting._replace(dropout_p=0.0), config),
        Region(q_begin, q_stop, k_stop),
        float(start),
        N_HEADS=n_heads,
        HEADS=heads,
        HAS_TAIL=left is not None or (q_stop - q_begin) % config.block_m != 0,
        STORED=stored is not None,
        ADDITIVE=additive,
        FOLD=fold,
    )
    if parts is not out:
        torch.sum(parts.view(batch, n_kv_heads, group, k_stop), 2, out=out)
    return out
