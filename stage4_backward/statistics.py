"""What attention can return beside output and lse: the table that operators, their shapes and gradients come from."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


def _of_queries(q: Tensor, k: Tensor, own: dict) -> tuple[int, ...]:
    return (*q.shape[:3],)


def _of_scores(q: Tensor, k: Tensor, own: dict) -> tuple[int, ...]:
    return (*q.shape[:3], k.shape[2])


def _of_keys(q: Tensor, k: Tensor, own: dict) -> tuple[int, ...]:
    n_heads = (q if own.get("per_query_head") else k).shape[1]
    return q.shape[0], n_heads, k.shape[2] if own["k_stop"] is None else own["k_stop"]


class Result(NamedTuple):
    """One of the tensors that a function of attention returns after output and lse."""

    name: str
    shape: Callable[[Tensor, Tensor, dict], tuple[int, ...]]  # of q, k and the function's own arguments
    gradient: str | None = None  # the field of `Gradients` that brings its gradient; None: it has none
    is_wide: bool = True  # fp32, else in q's dtype


class Statistic(NamedTuple):
    """A function of attention: `name(q, k, v, setting, *, own…) -> (output, lse, *results)`."""

    name: str
    own: dict[str, tuple[str, object]]  # its own arguments: type in an operator's schema, and default
    results: tuple[Result, ...]


PLAIN = Statistic("attention", {}, ())
SCORES = Statistic("attention_with_scores", {}, (Result("scores", _of_scores, "scores", is_wide=False),))
ROW_SUM = Statistic(
    "attention_with_row_sum", {"algorithm": ("str", "auto")}, (Result("row_sum", _of_queries, "row_sum"),)
)
COL_SUM = Statistic(
    "attention_with_col_sum",
    {"algorithm": ("str", "linear"), "q_begin": ("int", 0), "k_stop": ("int?", None)},
    (Result("col_sum", _of_keys, "col_sum"),),
)
SOFTMAX_COL_SUM = Statistic(
    "attention_with_softmax_col_sum",
    {
        "q_begin": ("int", 0),
        "q_stop": ("int?", None),
        "k_stop": ("int?", None),
        "per_query_head": ("bool", False),
        "buffered": ("bool", False),
    },
    (Result("softmax_col_sum", _of_keys, "softmax_col_sum"),),
)
STATS = Statistic(
    "attention_with_stats",
    {},
    (
        Result("entropy", _of_queries, "entropy"),
        Result("max_weight", _of_queries),
        Result("mean_distance", _of_queries),
    ),
)
