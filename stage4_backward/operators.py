"""Functions of attention on kernels, whoever calls: plain, to be differentiated, or traced by PyTorch's compiler."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.visibility import window_sides
from stage2_triton_forward.describe import output_dtype
from stage2_triton_forward.split_kv import attention_forward
from stage3_scores_and_sums import launch

from . import statistics
from .differentiable import differentiable, needs_gradients
from .gradients import Gradients
from .launch import backward
from .statistics import Statistic

_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None)}
_NAMESPACE = "flash_attention_with_scores"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_SETTING = (
    "bool causal, float? sm_scale, float dropout_p, int seed, int? window_left, int? window_right, float? softcap, "
    "Tensor? sinks, Tensor? key_padding_mask, Tensor? descale"
)
_N_SETTING = _SETTING.count(",") + 1
_ATTENTION = f"Tensor q, Tensor k, Tensor v, {_SETTING}"


def needs_operator(*inputs: Tensor | None) -> bool:
    """Return whether kernels are to be called as operators that PyTorch knows: to compile, trace or transform them.

    A plain call launches them itself, which takes a good deal less of Python.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or not _PLAIN_TYPES.issuperset(map(type, inputs))
    )


def flat(setting: Setting) -> tuple:
    """Return a setting as operators take it, the window in two parts."""
    return (*setting[:4], *window_sides(setting.window), *setting[5:])


def whole(arguments: tuple) -> Setting:
    """Return the setting that `flat` took apart."""
    causal, sm_scale, dropout_p, seed, left, right, *rest = arguments
    window = None if left is None and right is None else (left, right)
    return Setting(causal, sm_scale, dropout_p, seed, window, *rest)


def _register(name: str, schema: str, run: Callable, shapes: Callable):
    """Make an operator that PyTorch knows; return it.

    Registered for each device by itself: what `torch.library.custom_op` does beside takes longer than a short kernel.
    """
    _library.define(name + schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"{_NAMESPACE}::{name}", shapes, lib=_library)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


class AttentionOperator:
    """A function of attention as a plain launch, as a differentiable function, and as an operator of PyTorch."""

    def __init__(self, statistic: Statistic, attend: Callable[..., tuple[Tensor, ...]]):
        """Register the operator; `attend(q, k, v, setting, *, own…)` launches kernels."""
        self.statistic, self.attend = statistic, attend
        self.defaults = {name: default for name, (_, default) in statistic.own.items()}
        schema = ", ".join([_ATTENTION, *(f"{kind} {name}" for name, (kind, _) in statistic.own.items())])
        results = ", ".join(["Tensor"] * (2 + len(statistic.results)))
        self.op = _register(statistic.name, f"({schema}) -> ({results})", self._run, self._shapes)
        torch.library.register_autograd(self.op, self._gradients, setup_context=self._keep, lib=_library)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, setting: Setting, **own) -> tuple[Tensor, ...]:
        """Attend in the way that this call needs."""
        if needs_operator(q, k, v, setting.sinks):
            return self.op(q, k, v, *flat(setting), *(self.defaults | own).values())
        if needs_gradients(q, k, v, setting.sinks):
            attend = partial(self.attend, q, k, v, setting, **own)
            return differentiable(attend, _backward_once, self.statistic, q, k, v, setting, own)
        return self.attend(q, k, v, setting, **own)

    def _run(self, q, k, v, *arguments):
        setting, own = self._parts(arguments)
        return self.attend(q, k, v, setting, **own)

    def _shapes(self, q, k, v, *arguments):
        _, own = self._parts(arguments)
        wide = [q.new_empty(q.shape[:3], dtype=torch.float32)]
        for result in self.statistic.results:
            wide.append(q.new_empty(result.shape(q, k, own), dtype=torch.float32 if result.is_wide else q.dtype))
        return q.new_empty(*q.shape[:3], v.shape[3], dtype=output_dtype(q)), *wide

    def _keep(self, ctx, inputs, output):
        ctx.set_materialize_grads(False)
        q, k, v, *arguments = inputs
        setting, ctx.own = self._parts(tuple(arguments))
        ctx.save_for_backward(q, k, v, setting.sinks, setting.key_padding_mask, output[0], output[1])
        ctx.setting = setting._replace(sinks=None, key_padding_mask=None)

    def _gradients(self, ctx, grad_output, grad_lse, *grad_results):
        q, k, v, sinks, padding, output, lse = ctx.saved_tensors
        setting = ctx.setting._replace(sinks=sinks, key_padding_mask=padding)
        grads = Gradients.of(self.statistic, ctx.own, grad_output, grad_lse, grad_results)
        *results, grad_sinks = backward_op(q, k, v, *flat(setting), output, lse, *grads)
        others = [None] * _N_SETTING
        others[_N_SETTING - 3] = None if sinks is None else grad_sinks
        return *results, *others, *[None] * len(ctx.own)

    def _parts(self, arguments: tuple) -> tuple[Setting, dict]:
        """Return the setting and the function's own arguments."""
        own = dict(zip(self.defaults, arguments[_N_SETTING:], strict=True))
        return whole(arguments[:_N_SETTING]), own


def _backward_once(q, *arguments):
    """Run the backward kernels, which nobody can differentiate again."""
    if torch.is_grad_enabled():
        raise NotImplementedError("attention's kernels have no second derivatives; backend='pytorch' has")
    return backward(q, *arguments)


def _run_backward(q, k, v, *arguments):
    setting, (output, lse, *grads) = whole(arguments[:_N_SETTING]), arguments[_N_SETTING:]
    *results, grad_sinks = backward(q, k, v, output, lse, Gradients(*grads), setting)
    return *results, q.new_empty(0) if grad_sinks is None else grad_sinks


def _backward_shapes(q, k, v, *arguments):
    sinks = whole(arguments[:_N_SETTING]).sinks
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *grads, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


_BACKWARD = f"({_ATTENTION}, Tensor output, Tensor lse, {Gradients.schema()}) -> (Tensor, Tensor, Tensor, Tensor)"
backward_op = _register("backward", _BACKWARD, _run_backward, _backward_shapes)

attention = AttentionOperator(statistics.PLAIN, attention_forward)
attention_with_scores = AttentionOperator(statistics.SCORES, launch.attention_with_scores)
attention_with_row_sum = AttentionOperator(statistics.ROW_SUM, launch.attention_with_row_sum)
attention_with_col_sum = AttentionOperator(statistics.COL_SUM, launch.attention_with_col_sum)
attention_with_softmax_col_sum = AttentionOperator(statistics.SOFTMAX_COL_SUM, launch.attention_with_softmax_col_sum)
attention_with_stats = AttentionOperator(statistics.STATS, launch.attention_with_stats)


def _run_scores(q, k, *masks):
    return launch.compute_attention_scores(q, k, _masks(*masks))


def compute_attention_scores(q: Tensor, k: Tensor, setting: Setting) -> Tensor:
    """Return the scores alone, in the way that this call needs."""
    if needs_operator(q, k) or needs_gradients(q, k):
        sides = window_sides(setting.window)
        return scores_op(q, k, setting.causal, setting.sm_scale, *sides, setting.key_padding_mask)
    return launch.compute_attention_scores(q, k, setting)


def _masks(causal, sm_scale, left, right, key_padding_mask) -> Setting:
    return Setting(causal, sm_scale, window=(left, right), key_padding_mask=key_padding_mask)


def _scores_shape(q, k, *_):
    return q.new_empty(*q.shape[:3], k.shape[2])


def _keep_inputs(ctx, inputs, output):
    q, k, *ctx.masks, key_padding_mask = inputs
    ctx.save_for_backward(q, k, key_padding_mask)


def _scores_gradient(ctx, grad_scores):
    q, k, key_padding_mask = ctx.saved_tensors
    lse = q.new_full(q.shape[:3], torch.inf, dtype=torch.float32)  # weights of 0: only the scores' own gradient is left
    setting = flat(_masks(*ctx.masks, key_padding_mask))
    grad_q, grad_k, *_ = backward_op(q, k, k, *setting, torch.zeros_like(q), lse, *Gradients(scores=grad_scores))
    return grad_q, grad_k, *[None] * 5


_SCORES = (
    "(Tensor q, Tensor k, bool causal, float? sm_scale, int? window_left, int? window_right, Tensor? padding) -> Tensor"
)
scores_op = _register("compute_attention_scores", _SCORES, _run_scores, _scores_shape)
torch.library.register_autograd(scores_op, _scores_gradient, setup_context=_keep_inputs, lib=_library)
