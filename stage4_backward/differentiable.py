"""Makes a function of attention differentiable, by recomputation, whatever runs it."""

from collections.abc import Callable

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import Setting

from .gradients import Gradients
from .statistics import Statistic


def needs_gradients(*inputs: Tensor | None) -> bool:
    """Return whether a result of these inputs is to be differentiated."""
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and x.requires_grad:
                return True
    return False


def differentiable(
    attend: Callable[[], tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    statistic: Statistic,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: Setting,
    own: dict,
) -> tuple[Tensor, ...]:
    """Attend, and remember how to differentiate it.

    Args:
        attend: () -> (output, lse, *results), as `statistic` says.
        backward: (q, k, v, output, lse, grads, setting) -> gradients of q, k, v and sinks.
        q, k, v, setting, own: what `attend` was given.
    """
    return _Attention.apply(attend, backward, statistic, setting._replace(sinks=None), own, q, k, v, setting.sinks)


class _Attention(torch.autograd.Function):
    """Saves the inputs, the output and the lse: all that a backward pass by recomputation needs."""

    @staticmethod
    def forward(ctx, attend, backward, statistic, setting, own, q, k, v, sinks):
        results = attend()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *results[:2], sinks)
        ctx.given = backward, statistic, setting, own
        if torch.compiler.is_compiling():  # it traces the backward pass with gradients of all results, used or not
            without = [x for x, result in zip(results[2:], statistic.results, strict=True) if result.gradient is None]
            ctx.mark_non_differentiable(*without)
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_output, grad_lse, *grad_results):
        q, k, v, output, lse, sinks = ctx.saved_tensors
        backward, statistic, setting, own = ctx.given
        if torch.compiler.is_compiling():
            pairs = zip(grad_results, statistic.results, strict=True)
            grad_results = tuple([None if result.gradient is None else grad for grad, result in pairs])
        grads = Gradients.of(statistic, own, grad_output, grad_lse, grad_results)
        found = backward(q, k, v, output, lse, grads, setting._replace(sinks=sinks))
        return None, None, None, None, None, *found
