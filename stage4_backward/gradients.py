"""What the backward pass is given, whichever backend runs it."""

from typing import NamedTuple

from torch import Tensor


class Gradients(NamedTuple):
    """The loss's gradients of everything that attention returned; None where nothing was used."""

    output: Tensor | None = None  # [B, Hq, M, Dv]
    lse: Tensor | None = None  # [B, Hq, M]
    scores: Tensor | None = None  # [B, Hq, M, N], raw
    row_sum: Tensor | None = None  # [B, Hq, M], of raw scores
    col_sum: Tensor | None = None  # [B, Hk, k_stop], of raw scores
    softmax_col_sum: Tensor | None = None  # [B, Hk, k_stop] or [B, Hq, k_stop], of weights
    q_begin: int = 0  # column sums counted queries q_begin to q_stop
    q_stop: int | None = None  # None: to the last
