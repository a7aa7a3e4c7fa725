"""The oracle: attention straight from its definition, with every statistic that any stage returns.

Nothing here is tiled or clever. It builds the full M×N matrix, imports torch alone and shares no code with what it
grades. Evaluate it in float64 for the truth, and in the input's own dtype for the error that the formula itself makes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class NaiveAttention(NamedTuple):
    """All that `naive_attention` knows. Statistics are fp32 (fp64 for fp64 inputs); 3-D inputs drop the H axis."""

    output: Tensor  # [B, Hq, M, Dv]
    lse: Tensor  # [B, Hq, M], natural log; -inf where a row sees no key
    scores: Tensor  # [B, Hq, M, N], sm_scale·q·kᵀ before softcap, 0 where masked
    weights: Tensor  # [B, Hq, M, N], softmax over the visible keys (and the sink), before dropout
    row_sum: Tensor  # [B, Hq, M], scores summed over keys
    col_sum: Tensor  # [B, Hk, N], scores summed over queries and over the head group
    softmax_col_sum: Tensor  # [B, Hk, N], weights summed over queries and over the head group
    total_attention: Tensor  # [B, Hq, N], weights summed over queries
    entropy: Tensor  # [B, Hq, M], -Σ_j p·ln p over the keys, in nats; 0·ln 0 is 0
    max_weight: Tensor  # [B, Hq, M], the row's largest weight
    mean_distance: Tensor  # [B, Hq, M], Σ_j p·|i + N - M - j| / Σ_j p
    cross_token_qk_sum: Tensor  # [B, Hk, split], scores of query rows `split:` summed for keys `:split`
    cross_token_softmax_sum: Tensor  # [B, Hk, split], the same for weights


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    split: int = 0,
) -> NaiveAttention:
    """Compute attention by its definition, with the whole matrix in memory.

    Args:
        q: [B, Hq, M, D] or [B, M, D], any floating dtype, any strides.
        k: [B, Hk, N, D] or [B, N, D]; Hq is a multiple of Hk (grouped-query attention).
        v: [B, Hk, N, Dv] or [B, N, Dv].
        causal: query i sees key j iff j <= i + N - M (aligned to the bottom-right corner).
        sm_scale: factor on q·kᵀ; None means 1/sqrt(D).
        window: w for |i + N - M - j| <= w, or (left, right) with None for unbounded.
        softcap: logits become softcap·tanh(logits / softcap).
        sinks: [Hq], one extra logit per head that takes part in the denominator only.
        key_padding_mask: [B, N] bool, True for a real key.
        dropout_p: probability that a weight was dropped; survivors are scaled by 1 / (1 - dropout_p).
        dropout_mask: [B, Hq, M, N] bool, True for a kept weight; needed when dropout_p > 0.
        split: where the cross-token sums cut the sequence, in [0, N].

    Returns:
        A NaiveAttention. Rows that see no key have lse -inf, 0 for everything else, and add nothing to any sum.

    Source: Vaswani et al. 2017, eq. 1; sums as in H2O (Zhang et al. 2023).
    """
    if q.ndim == 3:
        if dropout_mask is not None and dropout_mask.ndim == 3:
            dropout_mask = dropout_mask.unsqueeze(1)
        result = naive_attention(
            *(x.unsqueeze(1) for x in (q, k, v)),
            causal=causal,
            sm_scale=sm_scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
            dropout_mask=dropout_mask,
            split=split,
        )
        return NaiveAttention(*(x.squeeze(1) for x in result))

    n_heads, n_kv_heads = q.shape[1], k.shape[1]
    group = n_heads // max(n_kv_heads, 1)
    k_all, v_all = (x.repeat_interleave(group, dim=1) for x in (k, v))  # [B, Hq, N, D]
    sm_scale = 1 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    visible = visible_keys(q.shape[2], k.shape[2], causal, window, key_padding_mask, q.device)
    raw = (q * sm_scale) @ k_all.transpose(-1, -2)  # [B, Hq, M, N]
    scores = raw.masked_fill(~visible, 0)
    logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    logits = logits.to(wide).masked_fill(~visible, -math.inf)

    lse = torch.logsumexp(logits, dim=-1)  # [B, Hq, M]
    empty = torch.isneginf(lse)
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks.to(wide)[None, :, None])
        lse = torch.where(empty, lse, with_sink)
    weights = torch.exp(logits - lse.masked_fill(empty, 0)[..., None])

    kept = weights if dropout_mask is None else weights * dropout_mask / (1 - dropout_p)
    output = kept.to(v.dtype) @ v_all

    total_attention = weights.sum(-2)
    weight_sum = weights.sum(-1)  # [B, Hq, M], 1, less what the sink took, or 0
    distance = key_distance(q.shape[2], k.shape[2], q.device).abs()
    return NaiveAttention(
        output=output,
        lse=lse,
        scores=scores,
        weights=weights,
        row_sum=scores.sum(-1, dtype=wide),
        col_sum=_sum_group(scores.sum(-2, dtype=wide), n_kv_heads),
        softmax_col_sum=_sum_group(total_attention, n_kv_heads),
        total_attention=total_attention,
        entropy=-(weights * weights.masked_fill(weights == 0, 1).log()).sum(-1),  # 0·ln 0 is 0, and so is its gradient
        max_weight=F.pad(weights, (0, 1)).amax(-1),  # a column of 0, for N = 0
        mean_distance=(weights * distance).sum(-1) / weight_sum.masked_fill(weight_sum == 0, 1),
        cross_token_qk_sum=_sum_group(scores[..., split:, :split].sum(-2, dtype=wide), n_kv_heads),
        cross_token_softmax_sum=_sum_group(weights[..., split:, :split].sum(-2), n_kv_heads),
    )


def visible_keys(
    n_q: int,
    n_k: int,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
    key_padding_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """Return the bool mask [1 or B, 1, M, N] that is True where a query may see a key."""
    distance = key_distance(n_q, n_k, device)
    visible = torch.ones(n_q, n_k, dtype=torch.bool, device=device)
    if causal:
        visible &= distance >= 0
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        if left is not None:
            visible &= distance <= left
        if right is not None:
            visible &= -distance <= right
    visible = visible[None, None]
    return visible if key_padding_mask is None else visible & key_padding_mask[:, None, None, :]


def key_distance(n_q: int, n_k: int, device: torch.device | str) -> Tensor:
    """Return i + N - M - j, int64 [M, N]: how far each key lies behind the query's own position."""
    return torch.arange(n_q, device=device)[:, None] + (n_k - n_q) - torch.arange(n_k, device=device)


def _sum_group(per_query_head: Tensor, n_kv_heads: int) -> Tensor:
    """Sum [B, Hq, ...] over each group of query heads that shares one key head, giving [B, Hk, ...]."""
    return per_query_head.unflatten(1, (n_kv_heads, -1)).sum(2) if n_kv_heads else per_query_head
