"""The public functions: check the input, choose a backend, delegate."""

import torch
from torch import Tensor

from stage1_pytorch_tiled.hooks import StoreScores
from stage1_pytorch_tiled.tiled_forward import TileGrid, blocks, tiled_attention

from .validation import check_attention, check_backend, check_qk

_CPU_TILES = {"block_m": 128, "block_n": 512}  # large enough to keep PyTorch busy, and still O(N)


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
    if dropout_p > 0 and seed is None:
        seed = int(torch.randint(2**62, ()))
    seed = seed or 0
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


def _kernels():
    """Import the Triton kernels on first use: the PyTorch backend works where Triton does not exist."""
    from stage3_scores_and_sums import launch

    return launch
