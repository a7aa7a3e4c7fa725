"""What runs attention: the kernels or PyTorch, with one face."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from stage1_pytorch_tiled.setting import Setting


class Room(NamedTuple):
    """Where results go, each contiguous; None for a new tensor."""

    output: Tensor | None = None  # [B, Hq, M, Dv]
    sums: Tensor | None = None  # [B, Hk, k_stop]
    reuse: bool = False  # whether whatever else is needed may come from the shared buffers


class Backend(Protocol):
    """The functions that both backends have. q [B, Hq, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv], all valid.

    Sums and statistics are fp32 (fp64 for fp64 inputs). All but the last three return output, lse and what they are
    named for, and can be differentiated.
    """

    def attention(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, ...]:
        """Return output and lse."""
        ...

    def attention_with_scores(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, ...]:
        """Return output, lse and scores [B, Hq, M, N]."""
        ...

    def attention_with_row_sum(
        self, q: Tensor, k: Tensor, v: Tensor, setting: Setting, *, algorithm: str
    ) -> tuple[Tensor, ...]:
        """Return output, lse and raw row sums [B, Hq, M]."""
        ...

    def attention_with_col_sum(
        self,
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
        """Return output, lse and raw column sums [B, Hk, k_stop] over the queries from q_begin on."""
        ...

    def attention_with_softmax_col_sum(
        self,
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
        """Return output, lse and softmax column sums [B, Hk, k_stop] (or Hq) over the queries q_begin to q_stop."""
        ...

    def attention_with_stats(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> tuple[Tensor, ...]:
        """Return output, lse, entropy, largest weight and mean distance of each query, [B, Hq, M]."""
        ...

    def compute_attention_scores(self, q: Tensor, k: Tensor, setting: Setting) -> Tensor:
        """Return the scores alone; can be differentiated."""
        ...

    def softmax_col_sum(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        setting: Setting,
        *,
        q_begin: int = 0,
        q_stop: int | None = None,
        per_query_head: bool = False,
    ) -> Tensor:
        """Return softmax column sums [B, Hk, N] (or Hq) alone, from the lse [B, Hq, M] of an earlier pass."""
        ...

    def fold_rows(self, q: Tensor, k: Tensor, lse: Tensor, setting: Setting, fold: Any, start: float) -> Tensor:
        """Fold each query's logits and weights, [B, Hq, M]."""
        ...

    def fold_columns(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        setting: Setting,
        fold: Any,
        start: float,
        *,
        per_query_head: bool = False,
    ) -> Tensor:
        """Fold each key's logits and weights, [B, Hk, N] (or Hq)."""
        ...

    def check_fold(self, name: str, fold: object) -> None:
        """Check a fold of the caller's; raise TypeError."""
        ...

    def check_device(self, q: Tensor) -> None:
        """Check that q lies where this backend runs; raise ValueError."""
        ...
