"""Stage 3 as operators that PyTorch knows: torch.compile, opcheck and CUDA graphs can work with them.

Functions have the names and arguments of `launch.py`, without room for results.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stage1_pytorch_tiled.tiled_forward import window_sides
from stage2_triton_forward.launch import output_dtype

from . import launch

ATTENTION = (
    "Tensor q, Tensor k, Tensor v, bool causal, float? sm_scale, float dropout_p, int seed, "
    "int? window_left, int? window_right, float? softcap, Tensor? sinks, Tensor? key_padding_mask"
)


class AttentionOp:
    """One function of `launch.py` as an operator: its arguments are those of attention, and some of its own."""

    def __init__(self, name: str, own: dict[str, tuple[str, object]], shapes: Callable[..., list[tuple]]):
        """Register `name`; `own` maps arguments to (type, default), `shapes` gives those of what follows the lse."""
        self.defaults = {argument: default for argument, (_, default) in own.items()}
        schema = ", ".join([ATTENTION, *(f"{kind} {argument}" for argument, (kind, _) in own.items())])
        n_results = 2 + (3 if name == "attention_with_stats" else 1)

        def run(q, k, v, causal, sm_scale, dropout_p, seed, left, right, softcap, sinks, key_padding_mask, *values):
            options = {
                "window": (left, right),
                "softcap": softcap,
                "sinks": sinks,
                "key_padding_mask": key_padding_mask,
            }
            options |= zip(own, values, strict=True)
            return getattr(launch, name)(q, k, v, causal, sm_scale, dropout_p, seed, **options)

        def fake(q, k, v, *arguments):
            values = dict(zip(own, arguments[len(arguments) - len(own) :], strict=True))
            dtype = q.dtype if name == "attention_with_scores" else torch.float32
            statistics = [q.new_empty(shape, dtype=dtype) for shape in shapes(q, k, **values)]
            output = q.new_empty(*q.shape[:3], v.shape[3], dtype=output_dtype(q))
            return output, q.new_empty(q.shape[:3], dtype=torch.float32), *statistics

        results = ", ".join(["Tensor"] * n_results)
        full_name = f"flash_attention_with_scores::{name}"
        self.op = torch.library.custom_op(full_name, run, mutates_args=(), schema=f"({schema}) -> ({results})")
        self.op.register_fake(fake)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        sm_scale: float | None,
        dropout_p: float,
        seed: int,
        *,
        window=None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **own,
    ) -> tuple[Tensor, ...]:
        """Call the operator with the arguments of the function in `launch.py`."""
        masks = (*window_sides(window), softcap, sinks, key_padding_mask)
        return self.op(q, k, v, causal, sm_scale, dropout_p, seed, *masks, *(self.defaults | own).values())


def _columns(q, k, k_stop, heads=None):
    return q.shape[0], k.shape[1] if heads is None else heads, k.shape[2] if k_stop is None else k_stop


attention_with_scores = AttentionOp("attention_with_scores", {}, lambda q, k: [(*q.shape[:3], k.shape[2])])
attention_with_row_sum = AttentionOp(
    "attention_with_row_sum", {"algorithm": ("str", "linear")}, lambda q, k, algorithm: [q.shape[:3]]
)
attention_with_col_sum = AttentionOp(
    "attention_with_col_sum",
    {"algorithm": ("str", "linear"), "q_begin": ("int", 0), "k_stop": ("int?", None)},
    lambda q, k, algorithm, q_begin, k_stop: [_columns(q, k, k_stop)],
)
attention_with_softmax_col_sum = AttentionOp(
    "attention_with_softmax_col_sum",
    {
        "q_begin": ("int", 0),
        "q_stop": ("int?", None),
        "k_stop": ("int?", None),
        "per_query_head": ("bool", False),
        "buffered": ("bool", False),
    },
    lambda q, k, q_begin, q_stop, k_stop, per_query_head, buffered: [
        _columns(q, k, k_stop, q.shape[1] if per_query_head else None)
    ],
)
attention_with_stats = AttentionOp("attention_with_stats", {}, lambda q, k: [q.shape[:3]] * 3)


@torch.library.custom_op("flash_attention_with_scores::compute_attention_scores", mutates_args=())
def compute_attention_scores(
    q: Tensor,
    k: Tensor,
    causal: bool,
    sm_scale: float | None,
    window_left: int | None,
    window_right: int | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Return the scores [B, Hq, M, N] in q's dtype, the window in two parts."""
    masks = {"window": (window_left, window_right), "key_padding_mask": key_padding_mask}
    return launch.compute_attention_scores(q, k, causal, sm_scale, **masks)


@compute_attention_scores.register_fake
def _scores_shape(q, k, *_):
    return q.new_empty(*q.shape[:3], k.shape[2])
