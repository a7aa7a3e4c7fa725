"""Every public operator as the fuzzer calls it: what arguments it has, and which fields of the truth it returns."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

import flash_attention_with_scores as library
from benchmark.fuzz_oracle import Region
from stage4_backward import autograd

MASKS = ("window", "key_padding_mask")
OPTIONS = ("dropout_p", "seed", "window", "softcap", "sinks", "key_padding_mask")


class Sizes(NamedTuple):
    """The shape of a case."""

    batch: int
    n_kv_heads: int
    group: int
    n_q: int
    n_k: int
    head_dim: int
    head_dim_v: int


class Operator(NamedTuple):
    """One public operator."""

    fields: Callable[[dict], tuple[str, ...]]  # of its own arguments: what it returns
    draw: Callable[[Random, Sizes], dict] = lambda rng, sizes: {}  # its own arguments
    region: Callable[[dict, Sizes], Region] = lambda own, sizes: Region()
    options: tuple[str, ...] = OPTIONS
    has_values: bool = True
    no_gradient: tuple[str, ...] = ()  # fields that are not differentiable
    bad: dict = {}  # own arguments that it must refuse  # noqa: RUF012 (never written to)


def _named(*fields: str) -> Callable[[dict], tuple[str, ...]]:
    return lambda own: fields


def _attention_fields(own: dict) -> tuple[str, ...]:
    lse = ("lse",) if own["return_lse"] else ()
    return ("output", *lse, *(("weight_sum",) if own["return_total_attention"] else ()))


def _flags(rng: Random, sizes: Sizes) -> dict:
    return {name: rng.random() < 0.6 for name in ("return_lse", "return_total_attention")}


def _algorithm(*names: str) -> Callable[[Random, Sizes], dict]:
    return lambda rng, sizes: {"algorithm": rng.choice(names)}


def _some_queries(rng: Random, sizes: Sizes) -> dict:
    if rng.random() < 0.3:
        return {}
    q_begin = rng.randint(0, sizes.n_q)
    return {"q_begin": q_begin, "q_stop": rng.choice((None, rng.randint(q_begin, sizes.n_q)))}


def _queries_region(own: dict, sizes: Sizes) -> Region:
    return Region(own.get("q_begin", 0), own.get("q_stop"))


def _cross_token(sums: str, *algorithms: str) -> Callable[[Random, Sizes], dict]:
    def draw(rng: Random, sizes: Sizes) -> dict:
        own = {"split": rng.randint(0, sizes.n_k)}
        if algorithms:
            own["algorithm"] = rng.choice(algorithms)
        if rng.random() < 0.5:
            own |= {"reuse_buffers": rng.random() < 0.6, "given": [x for x in ("out", sums) if rng.random() < 0.4]}
        return own

    return draw


def _cross_token_region(own: dict, sizes: Sizes) -> Region:
    return Region(min(own["split"], sizes.n_q), None, own["split"])


def _cumulative(rng: Random, sizes: Sizes) -> dict:
    return _some_queries(rng, sizes) | {"n_before": rng.choice((None, 0, sizes.n_k, rng.randint(0, sizes.n_k)))}


_FOLDS = {
    "row": ("row_squares", "max_weight", "row_largest_logit"),
    "col": ("col_squares", "col_max_weight", "col_largest_logit"),
}


def _folds(rng: Random, sizes: Sizes) -> dict:
    own = {axis: rng.choice((None, *fields)) for axis, fields in _FOLDS.items()}
    return own | {"per_query_head": rng.random() < 0.5}


def _fold_fields(own: dict) -> tuple[str, ...]:
    return ("output", *(own[axis] for axis in _FOLDS if own[axis]))


_COLUMN_ALGORITHMS = ("linear", "atomic_reverse", "atomic_round_robin")
_BAD_SPLIT = {"split": (-1, 2.0, 10**6)}
_BAD_ALGORITHM = {"algorithm": ("fast", "atomic")}
_BAD_QUERIES = {"q_begin": (-1, 10**6, 0.5), "q_stop": (10**6, True)}

OPERATORS = {
    "attention": Operator(_attention_fields, _flags, lambda own, sizes: Region(per_query_head=True)),
    "attention_with_scores": Operator(_named("output", "scores")),
    "compute_attention_scores": Operator(_named("scores"), options=MASKS, has_values=False),
    "attention_with_row_sum": Operator(_named("output", "row_sum"), _algorithm("linear", "kahan"), bad=_BAD_ALGORITHM),
    "attention_with_col_sum": Operator(
        _named("output", "col_sum"), _algorithm(*_COLUMN_ALGORITHMS), bad=_BAD_ALGORITHM
    ),
    "attention_with_col_sum_sequential": Operator(_named("output", "col_sum")),
    "attention_with_softmax_col_sum": Operator(
        _named("output", "weight_sum"), _some_queries, _queries_region, bad=_BAD_QUERIES
    ),
    "attention_cross_token_qk_sum": Operator(
        _named("output", "col_sum"),
        _cross_token("cross_token_qk_out", *_COLUMN_ALGORITHMS),
        _cross_token_region,
        bad=_BAD_SPLIT | _BAD_ALGORITHM,
    ),
    "attention_cross_token_softmax_sum": Operator(
        _named("output", "weight_sum"), _cross_token("cross_token_softmax_out"), _cross_token_region, bad=_BAD_SPLIT
    ),
    "attention_cross_token_softmax_sum_buffered": Operator(
        _named("output", "weight_sum"), _cross_token("cross_token_softmax_out"), _cross_token_region, bad=_BAD_SPLIT
    ),
    "attention_with_stats": Operator(
        _named("output", "lse", "entropy", "max_weight", "mean_distance"),
        no_gradient=("max_weight", "mean_distance"),
    ),
    "attention_with_reduction": Operator(
        _fold_fields,
        _folds,
        lambda own, sizes: Region(per_query_head=own["per_query_head"]),
        no_gradient=tuple(field for fields in _FOLDS.values() for field in fields),
        bad={"row": (3, len), "col": ("largest",), "per_query_head": (1,), "row_start": (float("nan"), "0")},
    ),
    "flash_attention_with_cumulative_scores": Operator(
        _named("output", "weight_sum"), _cumulative, _queries_region, bad=_BAD_QUERIES
    ),
    "FlashAttentionPyTorchFunc": Operator(
        _named("output"), lambda rng, sizes: {"flat": rng.random() < 0.5}, options=()
    ),
    "FlashAttentionTritonFunc": Operator(_named("output"), lambda rng, sizes: {"flat": rng.random() < 0.5}, options=()),
}


def call(operator: str, tensors: dict[str, Tensor], keywords: dict, own: dict) -> dict[str, Tensor]:
    """Call an operator; return its results by the names of the truth's fields.

    Args:
        operator: a name in OPERATORS.
        tensors: q, k, v, and those of sinks, key_padding_mask, cumulative_scores, out and the like that are given.
        keywords: causal, sm_scale, backend and options.
        own: the operator's own arguments, as its `draw` gives them.
    """
    kind = OPERATORS[operator]
    names = kind.fields(own)
    inputs = [tensors[name] for name in ("q", "k", "v")[: 3 if kind.has_values else 2]]
    own = {name: x for name, x in own.items() if name not in ("given", "n_before")}
    if operator.endswith("Func"):
        flat = own["flat"] and inputs[0].shape[1] == inputs[1].shape[1] == 1
        inputs = [x.squeeze(1) for x in inputs] if flat else inputs
        output = getattr(autograd, operator).apply(*inputs, keywords["causal"])
        return {"output": output.unsqueeze(1) if flat else output}
    if operator == "flash_attention_with_cumulative_scores":
        keywords = dict(keywords)
        own["scale"] = keywords.pop("sm_scale")
    if operator == "attention_with_reduction":
        own = _with_folds(own, keywords["backend"])
    others = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
    results = getattr(library, operator)(*inputs, **others, **keywords, **own)
    results = (results,) if isinstance(results, Tensor) else tuple(x for x in results if x is not None)
    return dict(zip(names, results, strict=True))


def _with_folds(own: dict, backend: str) -> dict:
    """Return the arguments with folds in place of the names of fields, and with what they start from."""
    made = dict(own)
    for axis, fields in _FOLDS.items():
        if own[axis] in fields:
            which = fields.index(own[axis])
            made[axis] = (_triton_folds if backend == "triton" else _pytorch_folds)()[which]
            made.setdefault(f"{axis}_start", -100 if which == 2 else 0.0)
    return made


def _pytorch_folds() -> tuple[Callable, ...]:
    def squares(acc, logits, weights, q_idx, k_idx):
        return acc + (weights**2).sum(-1)

    def largest_weight(acc, logits, weights, q_idx, k_idx):
        return torch.maximum(acc, weights.amax(-1))

    def largest_logit(acc, logits, weights, q_idx, k_idx):
        return torch.maximum(acc, logits.amax(-1))

    return squares, largest_weight, largest_logit


def _triton_folds() -> tuple[Callable, ...]:
    from benchmark.fuzz_fold_kernel import largest_logit
    from stage3_scores_and_sums.hooks import largest_weight, squared_weights

    return squared_weights, largest_weight, largest_logit
