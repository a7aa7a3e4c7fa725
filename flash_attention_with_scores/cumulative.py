"""Attention whose keys remember how much attention they have had: softmax column sums, added up from call to call."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stage1_pytorch_tiled.visibility import Window

from .api import attention
from .sums import attention_with_softmax_col_sum
from .validation import check_cumulative_scores, check_flag


def flash_attention_with_cumulative_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cumulative_scores: Tensor | None = None,
    scale: float | None = None,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    q_begin: int = 0,
    q_stop: int | None = None,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention, and add the attention that each key gets to what it had before.

    Args:
        q: [B, Hq, M, D], the new queries.
        k, v: [B, Hk, N, D] and [B, Hk, N, Dv], all keys so far; new ones come last.
        cumulative_scores: [B, Hk, n] fp32 (fp64 for fp64 inputs), n <= N, from earlier calls; keys from n on start at
            0. None for the first call.
        scale: factor on q·kᵀ; None means 1/sqrt(D).
        causal: query i sees key j iff j <= i + N - M.
        dropout_p and the others: as in `attention_with_softmax_col_sum`.

    Returns:
        output [B, Hq, M, Dv] in q's dtype, and the new cumulative scores [B, Hk, N]; the given ones stay as they are.
        A query gives away 1 in each of its heads (less what a sink takes, 0 if it sees no key), so the scores of a KV
        head add up to Hq/Hk times the number of queries so far.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range; the message names it.

    Source: the accumulated attention of H2O (Zhang et al. 2023), Algorithm 1.
    """
    if cumulative_scores is not None:
        check_cumulative_scores(q, k, cumulative_scores)
    output, sums = attention_with_softmax_col_sum(
        *(q, k, v, causal, scale, dropout_p),
        q_begin=q_begin,
        q_stop=q_stop,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_padding_mask=key_padding_mask,
        seed=seed,
        backend=backend,
    )
    if cumulative_scores is None:
        return output, sums
    return output, sums + nn.functional.pad(cumulative_scores, (0, sums.shape[2] - cumulative_scores.shape[2]))


class FlashAttentionWithAccumulation(nn.Module):
    """Attention as a module that adds up, over its calls, the attention that each key gets.

    Args:
        original_attention: what this module stands in for: kept under this name, to be put back, and called with the
            same arguments instead of FlashAttention while `accumulate_scores` is False. None for `attention`.
        accumulate_scores: whether calls add to the scores; an attribute that may be changed.
    """

    def __init__(self, original_attention: Callable[..., Tensor] | None = None, accumulate_scores: bool = True):
        super().__init__()
        if original_attention is not None and not callable(original_attention):
            raise TypeError(f"original_attention must be callable or None, got {type(original_attention).__name__}")
        check_flag("accumulate_scores", accumulate_scores)
        self.original_attention = original_attention
        self.accumulate_scores = accumulate_scores
        self._scores: Tensor | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        scale: float | None = None,
        *,
        dropout_p: float = 0.0,
        window: Window = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        seed: int | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Compute attention of new queries to all keys so far.

        Args:
            q, k, v: [B, H, N, D] as in `flash_attention_with_cumulative_scores`, or [B, N, D] for a single head. Keys
                may be more than in the last call (a cache that grew), or others' than the queries' (cross-attention).
            causal, scale and the others: as there; `original_attention` is passed those that are not the defaults.

        Returns:
            output, of q's shape but for v's last dimension.

        Raises:
            TypeError, ValueError: as there; also if batch size or KV heads changed or keys became fewer since the last
                call, which takes a `reset_scores()`.
        """
        masks = {"window": window, "softcap": softcap, "sinks": sinks, "key_padding_mask": key_padding_mask}
        options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "backend": backend, **masks}
        if not self.accumulate_scores and self.original_attention is not None:
            given = {name: x for name, x in options.items() if x is not None and (name != "dropout_p" or x)}
            return self.original_attention(q, k, v, causal, scale, **given)
        flat = isinstance(q, Tensor) and q.ndim == 3
        q, k, v = (x.unsqueeze(1) if isinstance(x, Tensor) and x.ndim == 3 else x for x in (q, k, v))
        if self.accumulate_scores:
            try:
                output, scores = flash_attention_with_cumulative_scores(
                    q, k, v, self._scores, scale, causal=causal, **options
                )
            except ValueError as error:
                if "cumulative_scores" not in str(error):
                    raise
                raise ValueError(f"{error}; call reset_scores() before a new sequence") from None
            self._scores = scores.detach()
        else:
            output: Any = attention(q, k, v, causal, scale, **options)
        return output.squeeze(1) if flat else output

    def reset_scores(self) -> None:
        """Forget the scores: the next call starts a new sequence."""
        self._scores = None

    def get_cumulative_scores(self) -> Tensor | None:
        """Return the scores [B, Hk, N] so far, without gradient, or None before the first call."""
        return self._scores
