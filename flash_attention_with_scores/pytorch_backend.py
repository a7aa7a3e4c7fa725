"""The functions of `stage3_scores_and_sums/launch.py` in tiled PyTorch, in O(N) memory: what CPU tensors run."""

import torch
from torch import Tensor

from stage1_pytorch_tiled import second_pass
from stage1_pytorch_tiled.hooks import AddColSum, AddRowSum, StoreScores
from stage1_pytorch_tiled.tiled_forward import TileGrid, blocks, tiled_attention, tiled_softmax_col_sum

_TILES = {"block_m": 128, "block_n": 512}  # large enough to keep PyTorch busy, and still O(N)


def attention(q, k, v, causal, sm_scale, dropout_p, seed, *, on_logits=None, **options) -> tuple[Tensor, Tensor]:
    """Return output and lse; options: window, softcap, sinks, key_padding_mask."""
    attend = {"dropout_p": dropout_p, "seed": seed, "on_logits": on_logits}
    return tiled_attention(q, k, v, causal, sm_scale, **attend, **options, **_TILES)


def attention_with_scores(q, k, v, *args, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and scores."""
    keep = StoreScores(q, k)
    return *attention(q, k, v, *args, on_logits=keep, **options), keep.scores


def compute_attention_scores(q, k, causal, sm_scale, *, window, key_padding_mask) -> Tensor:
    """Return the scores alone."""
    keep = StoreScores(q, k)
    grid = TileGrid(q, k, causal, sm_scale, window, key_padding_mask=key_padding_mask, **_TILES)
    for q_rows in blocks(q.shape[2], grid.block_m):
        for tile in grid.tiles_of(q_rows):
            keep(tile)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad) and not keep.scores.requires_grad:
        return (grid.q[..., :0] @ grid.k[..., :0].mT).flatten(1, 2)  # no tile was visible: zeros that hang on q and k
    return keep.scores


def attention_with_row_sum(q, k, v, *args, algorithm="linear", **options) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and raw row sums; there is one algorithm, the loop."""
    rows = AddRowSum(q, k)
    return *attention(q, k, v, *args, on_logits=rows, **options), rows.row_sum


def attention_with_col_sum(
    q, k, v, *args, algorithm="linear", q_begin=0, k_stop=None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, lse and raw column sums of a region; there is one algorithm, the loop."""
    columns = AddColSum(q, k, q_begin, k_stop)
    return *attention(q, k, v, *args, on_logits=columns, **options), columns.col_sum


def attention_with_softmax_col_sum(
    q, k, v, causal, sm_scale, dropout_p, seed,
    *, q_begin=0, q_stop=None, k_stop=None, per_query_head=False, buffered=False, **options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return output, lse and softmax column sums of a region; nothing is ever buffered here."""
    output, lse = attention(q, k, v, causal, sm_scale, dropout_p, seed, **options)
    region = {"q_begin": q_begin, "q_stop": q_stop, "k_stop": k_stop, "per_query_head": per_query_head}
    options.pop("sinks", None)  # they are in the lse
    return output, lse, tiled_softmax_col_sum(q, k, lse, causal, sm_scale, **region, **options, **_TILES)


def attention_with_stats(q, k, v, causal, sm_scale, dropout_p, seed, **options) -> tuple[Tensor, ...]:
    """Return output, lse, entropy, largest weight and mean distance."""
    output, lse = attention(q, k, v, causal, sm_scale, dropout_p, seed, **options)
    options.pop("sinks", None)
    return output, lse, *second_pass.tiled_row_stats(q, k, lse, causal, sm_scale, **options, **_TILES)


def fold_rows(q, k, lse, fold, start, causal, sm_scale, **options) -> Tensor:
    """Fold each query's logits and weights."""
    return second_pass.fold_rows(q, k, lse, fold, start, causal, sm_scale, **options, **_TILES)


def fold_columns(q, k, lse, fold, start, causal, sm_scale, *, per_query_head=False, **options) -> Tensor:
    """Fold each key's logits and weights."""
    if per_query_head:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return second_pass.fold_cols(q, k, lse, fold, start, causal, sm_scale, **options, **_TILES)
