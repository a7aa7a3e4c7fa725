"""Attention and the attention that keys get, under key masks of their own for each KV head, pad queries left out."""

from typing import Any

import torch
from torch import Tensor

from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.tiled_forward import Window, tiled_softmax_col_sum

from .problem import Problem, checked_problem, kernels

_TILES: dict[str, Any] = {"block_m": 128, "block_n": 512}


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    own_keys: bool = True,
    queries: tuple[int, int] | None = None,
    per_query_head: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention and, where asked for, softmax column sums over the queries that are real tokens.

    Args:
        q, k, v, causal, sm_scale, dropout_p, window, softcap, sinks, backend: as in `attention`.
        key_mask: [B, N] or [B, Hk, N] bool, True for keys that may be seen.
        own_keys: the last M keys are the queries' own, so that a query whose own key is masked is padding and adds
            nothing to the sums.
        queries: (begin, stop), the queries that count in the sums; None for no sums.
        per_query_head: sums of each query head, and not of a head group.

    Returns:
        output [B, Hq, M, Dv] in q's dtype, and sums [B, Hk, N] (or [B, Hq, N]) fp32 (fp64 for fp64 inputs), or None.
    """
    if key_mask is not None and key_mask.ndim == 3:
        return _by_kv_head(
            q, k, v, causal, sm_scale, dropout_p, window=window, softcap=softcap, sinks=sinks, key_mask=key_mask,
            own_keys=own_keys, queries=queries, per_query_head=per_query_head, backend=backend,
        )  # fmt: skip
    problem = checked_problem(
        q, k, v, causal, sm_scale, dropout_p, None, backend,
        window=window, softcap=softcap, sinks=sinks, key_padding_mask=key_mask,
    )  # fmt: skip
    output, lse = problem.attend()
    if queries is None:
        return output, None
    with torch.no_grad():
        if own_keys and key_mask is not None:
            is_pad = ~key_mask[:, k.shape[2] - q.shape[2] :]  # [B, M]
            lse = lse.masked_fill(is_pad[:, None], torch.inf)  # exp(logit - inf) is 0
        return output, _column_sums(problem, lse, queries, per_query_head)


def attention_weights(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, sm_scale: float | None, *, sinks=None, key_mask=None, **options
) -> Tensor:
    """Compute the weights [B, Hq, M, N] in q's dtype, dense, as eager attention returns them; before dropout."""
    if key_mask is None or key_mask.ndim == 2:
        masks = {"sinks": sinks, "key_padding_mask": key_mask}
        return naive_attention(q, k, v, causal, sm_scale, **masks, **options).weights.to(q.dtype)
    parts = []
    for h, rows in enumerate(_groups(q, k)):
        own = {"sinks": None if sinks is None else sinks[rows], "key_mask": key_mask[:, h]}
        parts.append(attention_weights(q[:, rows], k[:, h, None], v[:, h, None], causal, sm_scale, **own, **options))
    return torch.cat(parts, 1)


def _groups(q: Tensor, k: Tensor) -> list[slice]:
    """Return the query heads of each KV head."""
    group = q.shape[1] // k.shape[1]
    return [slice(h * group, (h + 1) * group) for h in range(k.shape[1])]


def _column_sums(problem: Problem, lse: Tensor, queries: tuple[int, int], per_query_head: bool) -> Tensor:
    options = {name: x for name, x in problem.options.items() if name != "sinks"}  # they are in the lse
    options |= {"q_begin": queries[0], "q_stop": queries[1], "per_query_head": per_query_head}
    arguments = (problem.q.detach(), problem.k.detach(), lse.detach(), problem.causal, problem.sm_scale)
    if problem.backend == "pytorch":
        return tiled_softmax_col_sum(*arguments, **options, **_TILES)
    return kernels("column_sums").softmax_col_sum(*arguments, **options)


def _by_kv_head(q, k, v, *args, sinks, key_mask, **options) -> tuple[Tensor, Tensor | None]:
    """Run each KV head with its own key mask: heads become batch rows, or are done in turn where sinks differ."""
    if sinks is not None:
        parts = [
            masked_attention(
                q[:, rows], k[:, h, None], v[:, h, None], *args, sinks=sinks[rows], key_mask=key_mask[:, h], **options
            )
            for h, rows in enumerate(_groups(q, k))
        ]
        outputs, sums = zip(*parts, strict=True)
        return torch.cat(outputs, 1), None if sums[0] is None else torch.cat(sums, 1)
    output, sums = masked_attention(
        q.unflatten(1, (k.shape[1], -1)).flatten(0, 1),
        *(x.flatten(0, 1).unsqueeze(1) for x in (k, v)),
        *args,
        key_mask=key_mask.flatten(0, 1),
        **options,
    )
    back = (k.shape[0], k.shape[1])
    output = output.unflatten(0, back).flatten(1, 2)
    return output, None if sums is None else sums.unflatten(0, back).flatten(1, 2)
