"""Attention that also returns its scores, their sums and statistics, without ever holding an N×N matrix."""

import importlib

from stage1_pytorch_tiled.dense import naive_attention
from stage4_backward.autograd import FlashAttentionPyTorchFunc, FlashAttentionTritonFunc

from .api import attention, attention_with_scores, compute_attention_scores
from .cumulative import FlashAttentionWithAccumulation, flash_attention_with_cumulative_scores
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

__version__ = "0.1.0"  # the only place where it stands

_LAZY = {  # what needs packages beside torch, and where it is; not in __all__, so that `import *` works without them
    "EvictingCache": "eviction",
    "get_all_cumulative_scores": "huggingface",
    "replace_attention_with_flash": "huggingface",
    "reset_cumulative_scores": "huggingface",
    "restore_attention": "huggingface",
}

__all__ = [
    "AttentionReduction",
    "AttentionStats",
    "FlashAttentionPyTorchFunc",
    "FlashAttentionTritonFunc",
    "FlashAttentionWithAccumulation",
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
    "flash_attention_with_cumulative_scores",
    "naive_attention",
    "release_buffers",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
