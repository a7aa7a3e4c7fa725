"""The public functions: check the input, choose a backend, delegate."""

import torch
from torch import Tensor

from stage1_pytorch_tiled.hooks import StoreScores
from stage1_pytorch_tiled.tiled_forward import TileGrid, Window, blocks, tiled_attention, window_sides

from .validation import check_attention, check_backend, check_features, check_qk

_CPU_TILES = {"block_m": 128, "block_n": 512}  # large enough to keep PyTorch busy, and still O(N)


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
        backend: "triton" (the default for CUDA tensors; on CPU tensors it needs Triton's interpreter) or "pytorch".

    Returns:
        output [B, Hq, M, Dv] in q's dtype (bf16 for fp8); with return_lse also lse [B, Hq, M] fp32 (fp64 for fp64
        inputs), natural log, sinks included. Rows that see no key: output 0, lse -inf.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range; the message names it.

    Source: FlashAttention-2 (Dao 2023), Algorithm 1; sinks as in gpt-oss (OpenAI 2025), softcap as in Gemma 2 (2024).
    """
    check_attention(q, k, v, causal, sm_scale, dropout_p, seed, allow_fp8=True, allow_other_v_width=True)
    check_features(q, k, window, softcap, sinks, key_padding_mask, descales)
    seed = _seed(dropout_p, seed)
    if check_backend(backend, q, k, v, *(() if sinks is None else (sinks,))) == "pytorch":
        output, lse = tiled_attention(
            q, k, v, causal, sm_scale,
            window=window, softcap=softcap, sinks=sinks, key_padding_mask=key_padding_mask,
            dropout_p=dropout_p, seed=seed, **_CPU_TILES,
        )  # fmt: skip
    else:
        from stage2_triton_forward.ops import forward_op

        left, right = window_sides(window)
        scale = None if sm_scale is None else float(sm_scale)
        descale = None if descales is None else _fold_descales(descales, q.device)
        output, lse = forward_op(
            q, k, v, causal, scale, float(dropout_p), seed, left, right, softcap, sinks, key_padding_mask, descale
        )
    return (output, lse) if return_lse else output


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and its scores in one pass over the tiles.

    Args:
        q: [B, Hq, M, D] fp16|bf16|fp32 (fp64 on the PyTorch backend), any strides, D from 1 to 256.
        k: [B, Hk, N, D], like q; Hq is a multiple of Hk (grouped-query attention).
        v: [B, Hk, N, D], like k.
        causal: query i sees key j iff j <= i + N - M (aligned to the bottom-right corner).
        sm_scale: factor on q·kᵀ; None means 1/sqrt(D).
        dropout_p: probability in [0, 1) of dropping a weight; changes the output only, never the scores.
        seed: key of dropout's random bits; None draws one from torch's generator. Same seed, same output.
        backend: "triton" (the default for CUDA tensors; on CPU tensors it needs Triton's interpreter) or "pytorch".

    Returns:
        output [B, Hq, M, D] and scores [B, Hq, M, N], both in q's dtype. Scores are sm_scale·q·kᵀ, masked positions 0;
        a row that sees no key has output 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range; the message names it.

    Source: FlashAttention-2 (Dao 2023), Algorithm 1, with the tile of S kept.
    """
    check_attention(q, k, v, causal, sm_scale, dropout_p, seed)
    seed = _seed(dropout_p, seed)
    if check_backend(backend, q, k, v) == "pytorch":
        keep = StoreScores(q, k)
        output, _ = tiled_attention(
            q, k, v, causal, sm_scale, dropout_p=dropout_p, seed=seed, on_logits=keep, **_CPU_TILES
        )
        return output, keep.scores
    return _kernels().attention_with_scores(q, k, v, causal, sm_scale, dropout_p, seed)


def compute_attention_scores(
    q: Tensor, k: Tensor, causal: bool = False, sm_scale: float | None = None, *, backend: str | None = None
) -> Tensor:
    """Compute the scores alone, without values, softmax or output.

    Args:
        q, k, causal, sm_scale, backend: as in `attention_with_scores`.

    Returns:
        scores [B, Hq, M, N] in q's dtype: sm_scale·q·kᵀ, with masked positions 0.

    Raises:
        TypeError, ValueError: as in `attention_with_scores`.
    """
    check_qk(q, k, causal, sm_scale)
    if check_backend(backend, q, k) == "pytorch":
        keep = StoreScores(q, k)
        grid = TileGrid(q, k, causal, sm_scale, **_CPU_TILES)
        for q_rows in blocks(q.shape[2], grid.block_m):
            for tile in grid.tiles_of(q_rows):
                keep(tile)
        return keep.scores
    return _kernels().compute_attention_scores(q, k, causal, sm_scale)


def _seed(dropout_p: float, seed: int | None) -> int:
    """Return the seed to use: the given one, one from torch's generator, or any where nothing is dropped."""
    if seed is None:
        return int(torch.randint(2**62, ())) if dropout_p > 0 else 0
    return seed


def _fold_descales(descales: tuple, device: torch.device) -> Tensor:
    """Return [2] fp32: the factors on q·kᵀ and on v, without waiting for the GPU."""
    q_descale, k_descale, v_descale = (
        x.to(device, torch.float32).reshape(()) if isinstance(x, Tensor) else torch.full((), x, device=device)
        for x in descales
    )
    return torch.stack([q_descale * k_descale, v_descale])


def _kernels():
    """Import the Triton kernels on first use: the PyTorch backend works where Triton does not exist."""
    from stage3_scores_and_sums import launch

    return launch
