"""The backward pass as an operator, and the gradients of every operator of stages 2 and 3: import it to have them."""

import torch
from torch import Tensor

from stage2_triton_forward.ops import forward_op
from stage3_scores_and_sums import ops as stage3
from stage3_scores_and_sums.ops import ATTENTION

from .gradients import Gradients
from .launch import backward
from .linear_grads import linear_col_sum_grads, linear_row_sum_grads

_INPUTS = 12  # arguments that all operators of attention have in common: q … key_padding_mask


def _run(q, k, v, causal, sm_scale, dropout_p, seed, left, right, softcap, sinks, key_padding_mask, *rest):
    output, lse, grad_output, grad_lse, grad_scores, grad_row, grad_col, grad_softmax_col, q_begin, q_stop = rest
    masks = {"window": (left, right), "key_padding_mask": key_padding_mask}
    grads = Gradients(grad_output, grad_lse, grad_scores, None, None, grad_softmax_col, q_begin, q_stop)
    if all(x is None for x in (grad_output, grad_lse, grad_scores, grad_softmax_col)):
        results = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
    else:
        options = masks | {"softcap": softcap, "sinks": sinks}
        *results, grad_sinks = backward(q, k, v, output, lse, grads, causal, sm_scale, dropout_p, seed, **options)
    if grad_row is not None:
        _add(results, linear_row_sum_grads(q, k, grad_row, causal, sm_scale, **masks))
    if grad_col is not None:
        _add(results, linear_col_sum_grads(q, k, grad_col, causal, sm_scale, q_begin=q_begin, **masks))
    return *results, q.new_empty(0) if grad_sinks is None else grad_sinks


def _add(results: list[Tensor], more: tuple[Tensor, Tensor]) -> None:
    """Add fp32 gradients of q and k."""
    for i, x in enumerate(more):
        results[i] = (results[i] + x).to(results[i].dtype)


def _shapes(q, k, v, *rest):
    sinks = rest[7]
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *grads, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


_GRADS = ", ".join(f"Tensor? grad_{name}" for name in Gradients._fields[:6])
_RESULTS = ", ".join(["Tensor"] * 4)  # of q, k, v and sinks (empty without)
backward_op = torch.library.custom_op(
    "flash_attention_with_scores::backward",
    _run,
    mutates_args=(),
    schema=f"({ATTENTION}, Tensor output, Tensor lse, {_GRADS}, int q_begin, int? q_stop) -> ({_RESULTS})",
)
backward_op.register_fake(_shapes)


def _make_differentiable(op, statistic: str | None, own: tuple[str, ...]) -> None:
    """Register the gradient of an operator of attention.

    Args:
        op: its results are output, lse and, if there is a statistic, that.
        statistic: a field of `Gradients`, or None.
        own: the names of the arguments after key_padding_mask.
    """

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        q, k, v, *options, sinks, key_padding_mask = inputs[:_INPUTS]
        ctx.save_for_backward(q, k, v, sinks, key_padding_mask, output[0], output[1])
        ctx.options = options
        ctx.own = dict(zip(own, inputs[_INPUTS:], strict=True))

    def gradient(ctx, grad_output, grad_lse, *grad_statistic):
        q, k, v, sinks, key_padding_mask, output, lse = ctx.saved_tensors
        if q.dtype.itemsize == 1:
            raise NotImplementedError("attention on fp8 inputs has no backward pass")
        if statistic is None and any(x is not None for x in grad_statistic):
            raise NotImplementedError("attention_with_stats: entropy, max_weight and mean_distance have no gradient")
        grads = Gradients(grad_output, grad_lse, **({statistic: grad_statistic[0]} if statistic else {}))
        q_begin, q_stop = ctx.own.get("q_begin", 0), ctx.own.get("q_stop")
        forward_arguments = (q, k, v, *ctx.options, sinks, key_padding_mask)
        *results, grad_sinks = backward_op(*forward_arguments, output, lse, *grads[:6], q_begin, q_stop)
        grad_sinks = None if sinks is None else grad_sinks
        return *results, *[None] * len(ctx.options), grad_sinks, None, *[None] * len(ctx.own)

    op.register_autograd(gradient, setup_context=setup_context)


_make_differentiable(forward_op, None, ("descale",))
for _name, _statistic in {
    "attention_with_scores": "scores",
    "attention_with_row_sum": "row_sum",
    "attention_with_col_sum": "col_sum",
    "attention_with_softmax_col_sum": "softmax_col_sum",
    "attention_with_stats": None,
}.items():
    _attention = getattr(stage3, _name)
    _make_differentiable(_attention.op, _statistic, tuple(_attention.defaults))


def _setup_scores(ctx, inputs, output):
    q, k, *ctx.options, key_padding_mask = inputs
    ctx.save_for_backward(q, k, key_padding_mask)


def _scores_gradient(ctx, grad_scores):
    q, k, key_padding_mask = ctx.saved_tensors
    causal, sm_scale, left, right = ctx.options
    lse = q.new_full(q.shape[:3], torch.inf, dtype=torch.float32)  # weights of 0: only the scores' own gradient is left
    options = (causal, sm_scale, 0.0, 0, left, right, None, None, key_padding_mask)
    grads = Gradients(scores=grad_scores)[:6]
    grad_q, grad_k, *_ = backward_op(q, k, k, *options, torch.zeros_like(q), lse, *grads, 0, None)
    return grad_q, grad_k, *[None] * 5


stage3.compute_attention_scores.register_autograd(_scores_gradient, setup_context=_setup_scores)
