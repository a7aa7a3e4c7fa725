"""Attention that also returns its scores: `from flash_attention_with_scores import attention_with_scores`."""

from stage1_pytorch_tiled.dense import naive_attention

from .api import attention, attention_with_scores, compute_attention_scores

__all__ = ["attention", "attention_with_scores", "compute_attention_scores", "naive_attention"]
