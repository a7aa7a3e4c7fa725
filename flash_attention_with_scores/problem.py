"""One call of the library: its arguments checked, its backend chosen."""

from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.tiled_forward import Window, window_sides
from stage4_backward.autograd import TiledAttentionFunc

from . import pytorch_backend
from .validation import check_attention, check_backend, check_features

STATISTICS = {  # the field of `Gradients` that a function's third result is
    "attention_with_scores": "scores",
    "attention_with_row_sum": "row_sum",
    "attention_with_col_sum": "col_sum",
    "attention_with_softmax_col_sum": "softmax_col_sum",
}


class Problem(NamedTuple):
    """Attention to be computed, with valid arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    sm_scale: float | None
    dropout_p: float
    seed: int
    options: dict  # window, softcap, sinks, key_padding_mask
    backend: str

    def attend(self, descale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return output and lse; `descale` is [2], for fp8."""
        if self.backend == "pytorch":
            return self.run("attention")
        inputs = (self.q, self.k, self.v, self.options["sinks"])
        if not needs_operator(*inputs):
            return kernels("split_kv").attention_forward(*self[:7], **self.options, descale=descale)
        masks = (self.options[name] for name in ("softcap", "sinks", "key_padding_mask"))
        return kernels("forward_ops").forward_op(*self[:7], *window_sides(self.options["window"]), *masks, descale)

    def run(self, name: str, buffers: dict[str, Tensor] | None = None, **own) -> tuple[Tensor, ...]:
        """Run a function of `stage3_scores_and_sums/launch.py`, or its twin in PyTorch.

        Args:
            name: which one.
            buffers: where results go, by the launch function's names; the kernels write there and allocate nothing.
            own: the function's own arguments.
        """
        inputs, arguments = (self.q, self.k, self.v), (self.causal, self.sm_scale, self.dropout_p, self.seed)
        sinks = self.options["sinks"]
        differentiable = needs_gradients(*inputs, sinks)
        if buffers and differentiable:
            raise ValueError("buffers and reuse_buffers do not go with gradients: call under torch.no_grad()")
        if self.backend == "triton":
            module = kernels("launch" if buffers or not needs_operator(*inputs, sinks) else "ops")
            return getattr(module, name)(*inputs, *arguments, **self.options, **own, **(buffers or {}))
        attend = partial(getattr(pytorch_backend, name), *inputs, *arguments, **self.options, **own)
        if not differentiable:
            return attend()
        options = {option: x for option, x in self.options.items() if option != "sinks"}
        region = {argument: own[argument] for argument in ("q_begin", "q_stop") if argument in own}
        return TiledAttentionFunc.apply(attend, STATISTICS.get(name), arguments, options, region, *inputs, sinks)


def checked_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sm_scale: float | None,
    dropout_p: float,
    seed: int | None,
    backend: str | None,
    *,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    descales: tuple | None = None,
    allow_fp8: bool = False,
) -> Problem:
    """Check the arguments that all functions of attention share; raise TypeError or ValueError.

    Under autocast q, k and v are cast to its dtype, as PyTorch's own attention does it. A seed of None is drawn from
    torch's generator where weights are dropped.
    """
    q, k, v = autocasted(q, k, v)
    check_attention(q, k, v, causal, sm_scale, dropout_p, seed, allow_fp8=allow_fp8)
    check_features(q, k, window, softcap, sinks, key_padding_mask, descales)
    backend = check_backend(backend, q, k, v, *(() if sinks is None else (sinks,)))
    if seed is None:
        seed = int(torch.randint(2**62, ())) if dropout_p > 0 else 0
    scale = None if sm_scale is None else float(sm_scale)
    options = {"window": window, "softcap": softcap, "sinks": sinks, "key_padding_mask": key_padding_mask}
    return Problem(q, k, v, causal, scale, float(dropout_p), seed, options, backend)


def needs_gradients(*inputs: Tensor | None) -> bool:
    """Return whether a result of these inputs is to be differentiated."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def needs_operator(*inputs: Tensor | None) -> bool:
    """Return whether kernels are to be called as operators that PyTorch knows.

    It must know them to differentiate, compile, trace or transform them. A plain call launches them itself, which
    takes a good deal less of Python.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or needs_gradients(*inputs)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(type(x) not in (Tensor, torch.nn.Parameter, type(None)) for x in inputs)
    )


def autocasted(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs in autocast's dtype, where autocast is on for their device; fp64 and fp8 stay what they are."""
    cast = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(
        x.to(torch.get_autocast_dtype(x.device.type))
        if isinstance(x, Tensor)
        and x.dtype in cast
        and x.device.type != "meta"  # which autocast does not know
        and torch.is_autocast_enabled(x.device.type)
        else x
        for x in inputs
    )


def kernels(module: str) -> ModuleType:
    """Import a module of kernels on first use, with the gradients of all operators: PyTorch alone works without Triton.

    Args:
        module: "launch", "ops" or "column_sums" of stage 3, "split_kv" or "forward_ops" (its ops) of stage 2.
    """
    import stage4_backward.ops  # noqa: F401  (gives the operators their gradients)
    from stage2_triton_forward import ops as forward_ops
    from stage2_triton_forward import split_kv
    from stage3_scores_and_sums import column_sums, launch, ops

    return {
        "launch": launch,
        "ops": ops,
        "column_sums": column_sums,
        "split_kv": split_kv,
        "forward_ops": forward_ops,
    }[module]
