"""What the backward pass is given, whichever backend runs it."""

from typing import NamedTuple

from torch import Tensor

from .statistics import Statistic


class Gradients(NamedTuple):
    """The loss's gradients of everything that attention returned; None where nothing was used."""

    output: Tensor | None = None  # [B, Hq, M, Dv]
    lse: Tensor | None = None  # [B, Hq, M]
    scores: Tensor | None = None  # [B, Hq, M, N], raw
    row_sum: Tensor | None = None  # [B, Hq, M], of raw scores
    col_sum: Tensor | None = None  # [B, Hk, k_stop], of raw scores
    softmax_col_sum: Tensor | None = None  # [B, Hk, k_stop] or [B, Hq, k_stop], of weights
    entropy: Tensor | None = None  # [B, Hq, M], of weights
    q_begin: int = 0  # column sums counted queries q_begin to q_stop
    q_stop: int | None = None  # None: to the last

    @classmethod
    def of(
        cls,
        statistic: Statistic,
        own: dict,
        grad_output: Tensor | None,
        grad_lse: Tensor | None,
        grad_results: tuple[Tensor | None, ...],
    ) -> "Gradients":
        """Sort the gradients of a function's results, in their order, into fields; `own` are its own arguments."""
        fields = {name: own[name] for name in ("q_begin", "q_stop") if name in own}
        for result, grad in zip(statistic.results, grad_results, strict=True):
            if grad is not None and result.gradient is None:
                without = [other.name for other in statistic.results if other.gradient is None]
                names = " and ".join([", ".join(without[:-1]), without[-1]] if len(without) > 1 else without)
                raise NotImplementedError(f"{statistic.name}: {names} have no gradient")
            if grad is not None:
                fields[result.gradient] = grad
        return cls(grad_output, grad_lse, **fields)

    @classmethod
    def schema(cls) -> str:
        """Return the fields as the arguments of an operator."""
        *tensors, q_begin, q_stop = cls._fields
        return ", ".join([*(f"Tensor? grad_{name}" for name in tensors), f"int {q_begin}", f"int? {q_stop}"])
