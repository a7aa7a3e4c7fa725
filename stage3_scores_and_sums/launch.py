"""Attention with its scores, sums and statistics: allocates outputs, and runs the loops with the hooks that fill them.

Every function takes q [B, Hq, M, D], k and v [B, Hk, N, D], a Setting, and room for results: `out` and `lse` as
`stage2_triton_forward.launch.forward` does, and what it returns beside. Inputs are taken as valid.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import triton
from torch import Tensor

from stage1_pytorch_tiled.setting import FULL, Setting
from stage2_triton_forward.describe import describable, describe_logits, padded_head_dim, readable, signed
from stage2_triton_forward.hook import constant
from stage2_triton_forward.launch import config_of, forward
from stage2_triton_forward.replay import replayed
from stage2_triton_forward.split_kv import attention_forward
from stage2_triton_forward.tile_config import cdiv

from . import hooks
from .column_sums import softmax_col_sum
from .hooks import ColSum, QuerySums, RowFold, RowSum, Scores, Stats
from .linear_sums import linear_col_sum, linear_row_sum
from .tile_config import has_few_queries, row_sum_algorithm


@replayed
def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting = FULL,
    *,
    q_begin: int = 0,
    k_stop: int | None = None,
    compute_output: bool = True,
    scores: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse, and the scores of queries q_begin on and keys before k_stop, in q's dtype, 0 where masked.

    With compute_output=False the softmax and the output are left out, and output and lse are not written.
    """
    batch, n_heads, n_q, _ = q.shape
    k_stop = k.shape[2] if k_stop is None else k_stop
    scores = q.new_empty(batch, n_heads, max(n_q - q_begin, 0), k_stop) if scores is None else scores
    whole = q_begin == 0 and k_stop == k.shape[2]
    if whole and describable(scores) is scores:
        hook, hook_tensor = hooks.STORE_SCORES_ASYNC, scores
    else:
        hook, hook_tensor = hooks.STORE_SCORES.given(Scores(scores, q_begin, k_stop)), None
    output, lse = forward(
        *(q, k, v, setting), hook=hook, hook_tensor=hook_tensor, compute_output=compute_output, out=out, lse=lse
    )
    return output, lse, scores


def compute_attention_scores(q: Tensor, k: Tensor, setting: Setting = FULL) -> Tensor:
    """Return the scores [B, Hq, M, N] alone: the same loop with the softmax and the output left out."""
    *_, scores = attention_with_scores(q, k, k, setting, compute_output=False)
    return scores


@replayed
def attention_with_row_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting = FULL,
    *,
    algorithm: str = "auto",
    row_sum: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and raw row sums [B, Hq, M] fp32.

    Args:
        algorithm: "linear" (in O(N·D), beside the loop), "kahan" (in the loop, with compensated summation), or "auto",
            the faster one for these lengths.
        row_sum: [B, Hq, M] fp32, where to.
    """
    row_sum = q.new_empty(q.shape[:3], dtype=torch.float32) if row_sum is None else row_sum
    if algorithm == "auto":
        algorithm = row_sum_algorithm(q.shape[2], k.shape[2])
    if algorithm == "linear":
        attend = partial(attention_forward, q, k, v, setting, out=out, lse=lse)
        return _side_by_side(attend, partial(linear_row_sum, q, k, setting, out=row_sum), row_sum)
    output, lse = forward(q, k, v, setting, hook=hooks.ROW_SUM.given(RowSum(row_sum)), out=out, lse=lse)
    return output, lse, row_sum if k.numel() else row_sum.zero_()


@replayed
def attention_with_col_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting = FULL,
    *,
    algorithm: str = "linear",
    q_begin: int = 0,
    k_stop: int | None = None,
    col_sum: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and raw column sums [B, Hk, k_stop] fp32 over the queries from q_begin on.

    Args:
        algorithm: "linear" (in O(N·D), beside the loop), or atomics in the loop, in an order that keeps programs apart:
            "atomic_reverse" (last key first under a causal mask, else round robin) or "atomic_round_robin".
        col_sum: [B, Hk, k_stop] fp32, where to.
    """
    k_stop = k.shape[2] if k_stop is None else k_stop
    col_sum = q.new_empty(*k.shape[:2], k_stop, dtype=torch.float32) if col_sum is None else col_sum
    region = {"q_begin": q_begin, "k_stop": k_stop}
    if algorithm == "linear" and has_few_queries(q, k):
        return *_attend_and_sum_columns(q, k, v, setting, **region, col_sum=col_sum, out=out, lse=lse), col_sum
    if algorithm == "linear":
        attend = partial(attention_forward, q, k, v, setting, out=out, lse=lse)
        return _side_by_side(attend, partial(linear_col_sum, q, k, setting, **region, out=col_sum), col_sum)
    backwards = setting.causal and algorithm == "atomic_reverse"
    hook = hooks.COL_SUM_ATOMIC_REVERSE if backwards else hooks.COL_SUM_ATOMIC_ROUND_ROBIN
    args = ColSum(col_sum.zero_(), q.shape[1] // k.shape[1], q_begin, k_stop)
    output, lse = forward(q, k, v, setting, hook=hook.given(args), out=out, lse=lse)
    return output, lse, col_sum


def _attend_and_sum_columns(q, k, v, setting, *, q_begin, k_stop, col_sum, out, lse) -> tuple[Tensor, Tensor]:
    """Attend with a loop that leaves the sums of its tiles of queries, and make the column sums of these."""
    q, setting = signed(q, setting), setting._replace(sm_scale=abs(setting.scale(q.shape[3])))
    tile = config_of(q, v, setting, hooks.QUERY_SUMS).block_m
    shape = (*q.shape[:2], cdiv(q.shape[2], tile), padded_head_dim(q.shape[3], q.dtype))
    sums = q.new_empty(shape, dtype=torch.float32)
    output, lse = forward(q, k, v, setting, hook=hooks.QUERY_SUMS.given(QuerySums(sums)), out=out, lse=lse)
    linear_col_sum(q, k, setting, q_begin=q_begin, k_stop=k_stop, tile_sums=(sums, tile), out=col_sum)
    return output, lse


@replayed
def attention_with_softmax_col_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting = FULL,
    *,
    q_begin: int = 0,
    q_stop: int | None = None,
    k_stop: int | None = None,
    per_query_head: bool = False,
    buffered: bool = False,
    scores: Tensor | None = None,
    col_sum: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and softmax column sums [B, Hk, k_stop] fp32 over the queries q_begin to q_stop.

    Args:
        per_query_head: return [B, Hq, k_stop].
        buffered: keep the scores of the region between the passes, [B, Hq, M - q_begin, k_stop], in place of computing
            them twice.
        scores: where to keep them.
        col_sum: [B, Hk, k_stop] fp32, where to.
    """
    stored = None
    if buffered:
        output, lse, stored = attention_with_scores(
            *(q, k, v, setting), q_begin=q_begin, k_stop=k_stop, scores=scores, out=out, lse=lse
        )
    else:
        output, lse = attention_forward(q, k, v, setting, out=out, lse=lse)
    region = {"q_begin": q_begin, "q_stop": q_stop, "k_stop": k_stop}
    col_sum = softmax_col_sum(
        *(q, k, lse, setting), **region, per_query_head=per_query_head, stored=stored, out=col_sum
    )
    return output, lse, col_sum


@replayed
def attention_with_stats(
    q: Tensor, k: Tensor, v: Tensor, setting: Setting = FULL
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, lse, and of each query its entropy, largest weight and mean distance, each [B, Hq, M] fp32."""
    entropy, max_weight, mean_distance = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(3))
    hook = hooks.STATS.given(Stats(entropy, max_weight, mean_distance))
    output, lse = forward(q, k, v, setting, hook=hook)
    if not k.numel():
        return output, lse, entropy.zero_(), max_weight.zero_(), mean_distance.zero_()
    return output, lse, entropy, max_weight, mean_distance


def fold_rows(
    q: Tensor, k: Tensor, lse: Tensor, setting: Setting, fold: triton.JITFunction, start: float = 0.0
) -> Tensor:
    """Fold each query's logits and weights in a second walk along its keys, [B, Hq, M] fp32; see `fold_columns`."""
    result = q.new_full(q.shape[:3], start, dtype=torch.float32)
    capping = describe_logits(1.0, setting.softcap, "ieee")
    args = RowFold(readable(lse), result, float(start), capping, constant(fold))
    forward(q, k, k, second_pass(setting), hook=hooks.FOLD_ROWS.given(args), compute_output=False)
    return result


def second_pass(setting: Setting) -> Setting:
    """Return what is left of a setting for a walk that only sees logits: the lse holds the sinks, the caller caps."""
    return setting._replace(softcap=None, sinks=None, dropout_p=0.0)


def _side_by_side(
    attend: Callable[[], tuple[Tensor, Tensor]], add_up: Callable[[], Tensor], sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend, and fill `sums` on a second stream meanwhile: one waits for the tensor cores, the other for memory."""
    if not sums.is_cuda:
        add_up()
        return *attend(), sums
    main, side = torch.cuda.current_stream(sums.device), _side_stream(sums.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        add_up()
    output, lse = attend()
    main.wait_stream(side)
    return output, lse, sums


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
