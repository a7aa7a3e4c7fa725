"""Short queries against long caches: many programs read a part of the keys each, and their results are merged."""

import torch
import triton
from torch import Tensor

from stage1_pytorch_tiled.tiled_forward import window_sides

from .launch import device_of, forward, output_dtype, padded_head_dim, readable
from .merge_kernel import merge_kernel
from .tile_config import merge_warps, split_count


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    *,
    n_splits: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """Run the forward pass, cut along the keys where queries alone would leave the GPU idle (flash decoding).

    Args:
        n_splits: into how many parts to cut the keys; None chooses.
        others: as in `launch.forward`.

    Returns:
        output and lse, as in `launch.forward`.

    Source: flash decoding (Dao, Haziza, Massa, Sizov 2023); the merge is Milakov and Gimelshein 2018, eq. 4.
    """
    batch, n_heads, n_q, _ = q.shape
    if n_q == 1 and dropout_p == 0 and k.numel():
        return _attend_one_query(q, k, v, sm_scale, n_splits, out, lse, **options)
    if n_splits is None:
        n_splits = split_count(batch * n_heads * triton.cdiv(max(n_q, 1), 64), k.shape[2], q.device)
    if n_splits == 1 or not q.numel() or not k.shape[2]:
        return forward(q, k, v, causal, sm_scale, dropout_p, seed, out=out, lse=lse, **options)
    sinks = options.pop("sinks", None)
    parts = forward(q, k, v, causal, sm_scale, dropout_p, seed, n_splits=n_splits, **options)
    return merge_splits(*parts, sinks, q, out, lse)


def _attend_one_query(q, k, v, sm_scale, n_splits, out, lse, *, window=None, sinks=None, **options):
    """Attend with one query a head: the heads that share keys become the rows of one tile.

    The single query stands at the last key, so that a causal mask hides nothing and a window is a slice of the cache.
    """
    batch, n_heads, _, head_dim = q.shape
    n_kv_heads, n_k = k.shape[1], k.shape[2]
    left, _ = window_sides(window)
    start = 0 if left is None else max(0, n_k - 1 - left)
    k, v = k[:, :, start:], v[:, :, start:]
    if options.get("key_padding_mask") is not None:
        options["key_padding_mask"] = options["key_padding_mask"][:, start:]
    rows = q.reshape(batch, n_kv_heads, n_heads // n_kv_heads, head_dim)
    if n_splits is None:
        n_splits = split_count(batch * n_kv_heads, n_k - start, q.device)
    if n_splits == 1 and sinks is None:
        out = None if out is None else out.view(*rows.shape[:3], -1)
        lse = None if lse is None else lse.view(rows.shape[:3])
        out, lse = forward(rows, k, v, False, sm_scale, out=out, lse=lse, **options)
    else:
        parts, part_lse = forward(rows, k, v, False, sm_scale, n_splits=n_splits, **options)
        parts, part_lse = parts.view(n_splits, batch, n_heads, 1, -1), part_lse.view(n_splits, batch, n_heads, 1)
        out, lse = merge_splits(parts, part_lse, sinks, q, out, lse)
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
    output = torch.empty(*rows, head_dim_v, dtype=output_dtype(like), device=parts.device) if out is None else out
    lse = torch.empty(rows, dtype=torch.float32, device=parts.device) if lse is None else lse
    with device_of(parts):
        merge_kernel[(lse.numel(),)](
            parts,
            part_lse,
            readable(sinks, lse),
            output,
            lse,
            lse.numel(),
            n_q,
            N_HEADS=n_heads,
            N_SPLITS=n_splits,
            HEAD_DIM_V=head_dim_v,
            BLOCK_S=triton.next_power_of_2(n_splits),
            BLOCK_DV=padded_head_dim(head_dim_v),
            HAS_SINKS=sinks is not None,
            num_warps=merge_warps(n_splits),
        )
    return output, lse
