"""Allocates the outputs of stage 3 and launches the forward loop with the hook that fills them."""

import torch
from torch import Tensor

from stage2_triton_forward.launch import forward

from .hooks import store_logits


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the output, and the scores [B, Hq, M, N] in q's dtype with masked positions 0.

    Args: as in `stage2_triton_forward.launch.forward`.
    """
    scores, hook = _score_hook(q, k)
    output, _ = forward(q, k, v, causal, sm_scale, dropout_p, seed, **hook)
    return output, scores


def compute_attention_scores(q: Tensor, k: Tensor, causal: bool = False, sm_scale: float | None = None) -> Tensor:
    """Return the scores [B, Hq, M, N] alone: the same loop with the softmax and the output left out."""
    scores, hook = _score_hook(q, k)
    forward(q, k, k, causal, sm_scale, **hook, compute_output=False)
    return scores


def _score_hook(q: Tensor, k: Tensor) -> tuple[Tensor, dict]:
    """Return room for the scores and the arguments of `forward` that fill it."""
    n_q, n_k = q.shape[2], k.shape[2]
    scores = torch.zeros(*q.shape[:3], n_k, dtype=q.dtype, device=q.device)
    return scores, {"on_logits": store_logits, "hook_args": (scores, n_q, n_k)}
