"""Short queries against long caches: many programs read a part of the keys each, and their results are merged."""

from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import FULL, Setting
from stage1_pytorch_tiled.visibility import window_sides

from .describe import output_dtype, padded_head_dim, readable
from .launch import forward
from .launcher import launch
from .merge_kernel import merge_kernel
from .replay import replayed
from .tile_config import merge_config, power_of_2, split_count, splits_of_queries


@replayed
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting = FULL,
    *,
    n_splits: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward pass, cut along the keys where queries alone would leave the GPU idle (flash decoding).

    Args:
        q, k, v, setting, out, lse: as in `launch.forward`.
        n_splits: into how many parts to cut the keys; None chooses.

    Returns:
        output and lse, as in `launch.forward`.

    Source: flash decoding (Dao, Haziza, Massa, Sizov 2023); the merge is Milakov and Gimelshein 2018, eq. 4.
    """
    if q.shape[2] == 1 and setting.dropout_p == 0 and k.numel():
        return _attend_one_query(q, k, v, setting, n_splits, out, lse)
    if n_splits is None:
        n_splits = splits_of_queries(q, k)
    if n_splits == 1 or not q.numel() or not k.shape[2]:
        return forward(q, k, v, setting, out=out, lse=lse)
    parts = forward(q, k, v, setting._replace(sinks=None), n_splits=n_splits)
    return merge_splits(*parts, setting.sinks, q, out, lse)


class OneQuery(NamedTuple):
    """One query a head, as a tile: the heads that share keys become the rows of one head, and see all keys left."""

    q: Tensor  # [B, Hk, G, D]
    k: Tensor  # [B, Hk, N', D], the slice of the cache that a window leaves
    v: Tensor
    setting: Setting
    start: int  # of the slice


def one_query(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> OneQuery:
    """Turn q [B, Hq, 1, D] into a tile; the query stands at the last key, so that a causal mask hides nothing."""
    batch, n_heads, _, head_dim = q.shape
    n_kv_heads, n_k = k.shape[1], k.shape[2]
    left, _ = window_sides(setting.window)
    start = 0 if left is None else max(0, n_k - 1 - left)
    padding = setting.key_padding_mask
    if start:
        k, v = k[:, :, start:], v[:, :, start:]
        padding = None if padding is None else padding[:, start:]
    setting = setting._replace(causal=False, window=None, key_padding_mask=padding)
    return OneQuery(q.reshape(batch, n_kv_heads, n_heads // n_kv_heads, head_dim), k, v, setting, start)


def _attend_one_query(q, k, v, setting, n_splits, out, lse) -> tuple[Tensor, Tensor]:
    """Attend with one query a head."""
    batch, n_heads = q.shape[:2]
    rows, k, v, setting, _ = one_query(q, k, v, setting)
    if n_splits is None:
        n_splits = split_count(batch * k.shape[1], k.shape[2], q.device)
    if n_splits == 1 and setting.sinks is None:
        out = None if out is None else out.view(*rows.shape[:3], -1)
        lse = None if lse is None else lse.view(rows.shape[:3])
        out, lse = forward(rows, k, v, setting, out=out, lse=lse)
    else:
        parts, part_lse = forward(rows, k, v, setting._replace(sinks=None), n_splits=n_splits)
        parts, part_lse = parts.view(n_splits, batch, n_heads, 1, -1), part_lse.view(n_splits, batch, n_heads, 1)
        out, lse = merge_splits(parts, part_lse, setting.sinks, q, out, lse)
    return out.view(batch, n_heads, 1, -1), lse.view(batch, n_heads, 1)


def merge_splits(
    parts: Tensor,
    part_lse: Tensor,
    sinks: Tensor | None,
    like: Tensor,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the results of disjoint sets of keys.

    Args:
        parts: [splits, B, Hq, M, Dv], each normalised over its own keys.
        part_lse: [splits, B, Hq, M] fp32.
        sinks: [Hq] or None, joins the denominator now.
        like: gives the output's dtype (bf16 for fp8).
        out, lse: contiguous, where to; None for new ones.

    Returns:
        output [B, Hq, M, Dv] and lse [B, Hq, M].
    """
    n_splits, batch, n_heads, n_q, head_dim_v = parts.shape
    rows = (batch, n_heads, n_q)
    output = parts.new_empty((*rows, head_dim_v), dtype=output_dtype(like)) if out is None else out
    lse = parts.new_empty(rows, dtype=torch.float32) if lse is None else lse
    launch(
        merge_kernel,
        (lse.numel(),),
        merge_config(n_splits),
        parts,
        part_lse,
        readable(sinks),
        output,
        lse,
        lse.numel(),
        n_q,
        N_HEADS=n_heads,
        N_SPLITS=n_splits,
        HEAD_DIM_V=head_dim_v,
        BLOCK_S=power_of_2(n_splits),
        BLOCK_DV=padded_head_dim(head_dim_v),
        HAS_SINKS=sinks is not None,
    )
    return output, lse
