"""Hugging Face models whose attention keeps, of each key, the attention that it has had.

`replace_attention_with_flash(model)` goes through transformers' own extension points: an attention function and a mask
function registered under one name, forward hooks, and cache layers that keep scores beside their keys (so that beam
search, cropping and several caches in turn are right). transformers 4.57 and 5 are supported.
"""

from .models import (
    NAME,
    WEIGHTS_SLOTS,
    get_all_cumulative_scores,
    replace_attention_with_flash,
    reset_cumulative_scores,
    restore_attention,
)

__all__ = [
    "NAME",
    "WEIGHTS_SLOTS",
    "get_all_cumulative_scores",
    "replace_attention_with_flash",
    "reset_cumulative_scores",
    "restore_attention",
]
