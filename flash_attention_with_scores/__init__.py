"""Attention that also returns its scores, their sums and statistics, without ever holding an N×N matrix."""

from stage1_pytorch_tiled.dense import naive_attention

from .api import attention, attention_with_scores, compute_attention_scores
from .statistics import AttentionReduction, AttentionStats, attention_with_reduction, attention_with_stats
from .sums import (
    attention_cross_token_qk_sum,
    attention_cross_token_softmax_sum,
    attention_cross_token_softmax_sum_buffered,
    attention_with_col_sum,
    attention_with_col_sum_sequential,
    attention_with_row_sum,
    attention_with_softmax_col_sum,
)
from .workspace import release_buffers

__all__ = [
    "AttentionReduction",
    "AttentionStats",
    "attention",
    "attention_cross_token_qk_sum",
    "attention_cross_token_softmax_sum",
    "attention_cross_token_softmax_sum_buffered",
    "attention_with_col_sum",
    "attention_with_col_sum_sequential",
    "attention_with_reduction",
    "attention_with_row_sum",
    "attention_with_scores",
    "attention_with_softmax_col_sum",
    "attention_with_stats",
    "compute_attention_scores",
    "naive_attention",
    "release_buffers",
]
