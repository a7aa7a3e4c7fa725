"""The kernels, with the face of `backend.Backend`: what CUDA tensors run, and Triton's interpreter."""

import torch
from torch import Tensor
from triton import knobs

from stage1_pytorch_tiled.setting import Setting
from stage3_scores_and_sums import launch
from stage3_scores_and_sums.column_sums import fold_columns as fold_columns
from stage3_scores_and_sums.column_sums import softmax_col_sum as softmax_col_sum
from stage3_scores_and_sums.launch import fold_rows as fold_rows
from stage4_backward import operators
from stage4_backward.operators import compute_attention_scores as compute_attention_scores

from .backend import Room
from .validation import check_fold_arguments
from .workspace import buffer

_INTERPRETED: bool = knobs.runtime.interpret

attention = operators.attention
attention_with_scores = operators.attention_with_scores
attention_with_row_sum = operators.attention_with_row_sum
attention_with_stats = operators.attention_with_stats


def attention_with_col_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    *,
    algorithm: str,
    q_begin: int = 0,
    k_stop: int | None = None,
    room: Room | None = None,
) -> tuple[Tensor, ...]:
    """Return output, lse and raw column sums."""
    if room is None:
        return operators.attention_with_col_sum(q, k, v, setting, algorithm=algorithm, q_begin=q_begin, k_stop=k_stop)
    return launch.attention_with_col_sum(
        *(q, k, v, setting),
        algorithm=algorithm,
        q_begin=q_begin,
        k_stop=k_stop,
        out=room.output,
        lse=_reused(room, "lse", q.shape[:3], torch.float32, q),
        col_sum=room.sums,
    )


def attention_with_softmax_col_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    *,
    q_begin: int = 0,
    q_stop: int | None = None,
    k_stop: int | None = None,
    per_query_head: bool = False,
    buffered: bool = False,
    room: Room | None = None,
) -> tuple[Tensor, ...]:
    """Return output, lse and softmax column sums."""
    region = {"q_begin": q_begin, "q_stop": q_stop, "k_stop": k_stop}
    own = {"per_query_head": per_query_head, "buffered": buffered}
    if room is None:
        return operators.attention_with_softmax_col_sum(q, k, v, setting, **region, **own)
    n_stored = (*q.shape[:2], q.shape[2] - q_begin, k.shape[2] if k_stop is None else k_stop)
    return launch.attention_with_softmax_col_sum(
        *(q, k, v, setting),
        **region,
        **own,
        out=room.output,
        lse=_reused(room, "lse", q.shape[:3], torch.float32, q),
        col_sum=room.sums,
        scores=_reused(room, "scores", n_stored, q.dtype, q) if buffered else None,
    )


def check_fold(name: str, fold) -> None:
    """Check a fold of the caller's: jitted, with five arguments."""
    code = getattr(fold, "fn", None)  # of a @triton.jit function, compiled or interpreted
    if code is None:
        raise TypeError(f"{name} must be a @triton.jit function for backend='triton', got {fold!r}")
    check_fold_arguments(name, code)


def check_device(q: Tensor) -> None:
    """Check that q is on a GPU, or that kernels are interpreted."""
    if not q.is_cuda and not _INTERPRETED:
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got tensors on {q.device}; "
            "to run kernels in Triton's interpreter, set TRITON_INTERPRET=1 before Python starts"
        )


def _reused(room: Room, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor | None:
    """Return a shared buffer where room may be reused, else None, for a new tensor."""
    return buffer(f"kernels' {name}", shape, dtype, like.device) if room.reuse else None
