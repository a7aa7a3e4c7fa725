"""Attention and the attention that keys get, under key masks of their own for each KV head, pad queries left out."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.setting import Setting

from .problem import checked_problem


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    backend: str | None,
    *,
    own_keys: bool = True,
    queries: tuple[int, int] | None = None,
    per_query_head: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention and, where asked for, softmax column sums over the queries that are real tokens.

    Args:
        q, k, v, backend: as in `attention`.
        setting: unchecked, without a seed; its key_padding_mask may also be [B, Hk, N].
        own_keys: the last M keys are the queries' own, so that a query whose own key is masked is padding and adds
            nothing to the sums.
        queries: (begin, stop), the queries that count in the sums; None for no sums.
        per_query_head: sums of each query head, and not of a head group.

    Returns:
        output [B, Hq, M, Dv] in q's dtype, and sums [B, Hk, N] (or [B, Hq, N]) fp32 (fp64 for fp64 inputs), or None.
    """
    key_mask = setting.key_padding_mask
    if key_mask is not None and key_mask.ndim == 3:
        sums = {"own_keys": own_keys, "queries": queries, "per_query_head": per_query_head}
        return _by_kv_head(q, k, v, setting, key_mask, backend, **sums)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, None, backend)
    output, lse = runs.attention(q, k, v, setting)
    if queries is None:
        return output, None
    with torch.no_grad():
        if own_keys and key_mask is not None:
            is_pad = ~key_mask[:, k.shape[2] - q.shape[2] :]  # [B, M]
            lse = lse.masked_fill(is_pad[:, None], torch.inf)  # exp(logit - inf) is 0
        region = {"q_begin": queries[0], "q_stop": queries[1], "per_query_head": per_query_head}
        return output, runs.softmax_col_sum(q.detach(), k.detach(), lse.detach(), setting, **region)


def attention_weights(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Tensor:
    """Compute the weights [B, Hq, M, N] in q's dtype, dense, as eager attention returns them; before dropout."""
    causal, sm_scale, _, _, window, softcap, sinks, key_mask, _ = setting
    if key_mask is None or key_mask.ndim == 2:
        options = {"window": window, "softcap": softcap, "sinks": sinks, "key_padding_mask": key_mask}
        return naive_attention(q, k, v, causal, sm_scale, **options).weights.to(q.dtype)
    return torch.cat([attention_weights(*part) for part in _kv_heads(q, k, v, setting, key_mask)], 1)


def _kv_heads(
    q: Tensor, k: Tensor, v: Tensor, setting: Setting, key_mask: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Setting]]:
    """Yield the problem of each KV head, with its own key mask out of [B, Hk, N]."""
    group = q.shape[1] // k.shape[1]
    for h in range(k.shape[1]):
        rows = slice(h * group, (h + 1) * group)
        sinks = None if setting.sinks is None else setting.sinks[rows]
        own = setting._replace(sinks=sinks, key_padding_mask=key_mask[:, h])
        yield q[:, rows], k[:, h, None], v[:, h, None], own


def _by_kv_head(q, k, v, setting: Setting, key_mask: Tensor, backend, **sums_of) -> tuple[Tensor, Tensor | None]:
    """Run each KV head with its own key mask: heads become batch rows, or are done in turn where sinks differ."""
    if setting.sinks is not None:
        parts = [masked_attention(*part, backend, **sums_of) for part in _kv_heads(q, k, v, setting, key_mask)]
        outputs, sums = zip(*parts, strict=True)
        return torch.cat(outputs, 1), None if sums[0] is None else torch.cat(sums, 1)
    output, sums = masked_attention(
        q.unflatten(1, (k.shape[1], -1)).flatten(0, 1),
        k.flatten(0, 1).unsqueeze(1),
        v.flatten(0, 1).unsqueeze(1),
        setting._replace(key_padding_mask=key_mask.flatten(0, 1)),
        backend,
        **sums_of,
    )
    back = (k.shape[0], k.shape[1])
    output = output.unflatten(0, back).flatten(1, 2)
    return output, None if sums is None else sums.unflatten(0, back).flatten(1, 2)
