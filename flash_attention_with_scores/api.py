"""Attention itself, and attention with its scores: check the input, choose a backend, delegate."""

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.visibility import Window

from .problem import checked_problem


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    descales: tuple[float | Tensor, float | Tensor, float | Tensor] | None = None,
    seed: int | None = None,
    return_lse: bool = False,
    return_total_attention: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Compute attention without ever holding the matrix of scores.

    Args:
        q: [B, Hq, M, D] fp16|bf16|fp32 (PyTorch backend also fp64, Triton also fp8 e4m3|e5m2), any strides, D 1 to 256.
        k: [B, Hk, N, D], like q; Hq is a multiple of Hk (grouped-query attention).
        v: [B, Hk, N, Dv], like k, Dv from 1 to 256.
        causal: query i sees key j iff j <= i + N - M (aligned to the bottom-right corner).
        sm_scale: factor on q·kᵀ; None means 1/sqrt(D).
        dropout_p: probability in [0, 1) of dropping a weight.
        window: w for |i + N - M - j| <= w, or (left, right) with None for unbounded; combines with causal.
        softcap: logits become softcap·tanh(logits / softcap); > 0.
        sinks: [Hq] floating, one extra logit per head that takes part in the denominator only.
        key_padding_mask: [B, N] bool, True for a real key.
        descales: for fp8, what q, k and v are to be multiplied by, each above 0, a number or a tensor of one element.
        seed: key of dropout's random bits; None draws one from torch's generator. Same seed, same output.
        return_lse: also return the log-sum-exp.
        return_total_attention: also return the attention that each key gets from each query head.
        backend: "triton" (the default for CUDA tensors; on CPU tensors it needs Triton's interpreter) or "pytorch".

    Returns:
        output [B, Hq, M, Dv] in q's dtype (bf16 for fp8); with return_lse also lse [B, Hq, M] fp32 (fp64 for fp64
        inputs), natural log, sinks included; with return_total_attention also [B, Hq, N] fp32 (fp64), the softmax
        weights summed over the queries. Rows that see no key: output 0, lse -inf, no attention given.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range; the message names it.

    Source: FlashAttention-2 (Dao 2023), Algorithm 1; sinks as in gpt-oss (OpenAI 2025), softcap as in Gemma 2 (2024).
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend, descales=descales, allow_fp8=True)
    if return_total_attention:
        if q.dtype.itemsize == 1:
            raise ValueError(f"return_total_attention takes fp16, bf16, fp32 or fp64, got {q.dtype}")
        output, lse, total = runs.attention_with_softmax_col_sum(q, k, v, setting, per_query_head=True)
        return (output, lse, total) if return_lse else (output, total)
    if descales is not None:
        setting = setting._replace(descale=_fold_descales(descales, q.device))
    output, lse = runs.attention(q, k, v, setting)
    return (output, lse) if return_lse else output


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and its scores in one pass over the tiles.

    Args:
        q, k, v and the others: as in `attention`, fp8 excepted.

    Returns:
        output [B, Hq, M, Dv] and scores [B, Hq, M, N], both in q's dtype. Scores are sm_scale·q·kᵀ, before softcap and
        whatever is dropped; masked positions are 0. A row that sees no key has output 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range; the message names it.

    Source: FlashAttention-2 (Dao 2023), Algorithm 1, with the tile of S kept.
    """
    setting = Setting(causal, sm_scale, dropout_p, 0, window, softcap, sinks, key_padding_mask)
    q, k, v, setting, runs = checked_problem(q, k, v, setting, seed, backend)
    output, _, scores = runs.attention_with_scores(q, k, v, setting)
    return output, scores


def compute_attention_scores(
    q: Tensor,
    k: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    window: Window = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the scores alone, without values, softmax or output.

    Args:
        q, k and the others: as in `attention_with_scores`.

    Returns:
        scores [B, Hq, M, N] in q's dtype: sm_scale·q·kᵀ, with masked positions 0.

    Raises:
        TypeError, ValueError: as in `attention_with_scores`.
    """
    setting = Setting(causal, sm_scale, window=window, key_padding_mask=key_padding_mask)
    q, k, _, setting, runs = checked_problem(q, k, k, setting, 0, backend)
    return runs.compute_attention_scores(q, k, setting)


def _fold_descales(descales: tuple, device: torch.device) -> Tensor:
    """Return [2] fp32: the factors on q·kᵀ and on v, without waiting for the GPU."""
    q_descale, k_descale, v_descale = (
        x.to(device, torch.float32).reshape(()) if isinstance(x, Tensor) else torch.full((), x, device=device)
        for x in descales
    )
    return torch.stack([q_descale * k_descale, v_descale])
