"""All that attention is told beside q, k and v, in one piece: made once, and passed whole from function to function."""

import math
from typing import NamedTuple

from torch import Tensor

from .visibility import Window


class Setting(NamedTuple):
    """How attention is to be computed; the default is full attention at the usual scale."""

    causal: bool = False  # query i sees key j iff j <= i + N - M: aligned to the bottom-right corner
    sm_scale: float | None = None  # factor on q·kᵀ; None means 1/sqrt(D)
    dropout_p: float = 0.0  # probability of dropping a weight; acts on the output only
    seed: int = 0  # key of the Philox generator behind dropout
    window: Window = None  # w for |i + N - M - j| <= w, or (left, right) with None for unbounded
    softcap: float | None = None  # logits become softcap·tanh(logits / softcap)
    sinks: Tensor | None = None  # [Hq], one extra logit per head that takes part in the denominator only
    key_padding_mask: Tensor | None = None  # [B, N] bool, True for a real key
    descale: Tensor | None = None  # [2] fp32, factors on q·kᵀ and on v, for fp8

    def scale(self, head_dim: int) -> float:
        """Return the factor on q·kᵀ for rows of `head_dim` elements."""
        return 1 / math.sqrt(head_dim) if self.sm_scale is None else float(self.sm_scale)


FULL = Setting()
