"""FlashAttention as `torch.autograd.Function`s: forward passes of stages 1 to 3, backward passes by recomputation."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.tiled_forward import tiled_attention

from .gradients import Gradients
from .recompute_pytorch import recompute_backward


class _FlashAttentionFunc(torch.autograd.Function):
    """Saves q, k, v, the output and one lse tensor: all that a backward pass by recomputation needs.

    The lse is not an output, so that second derivatives would miss what flows through it: asking for them raises.
    """

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        """Return output and lse of [B, H, N, D] inputs."""
        raise NotImplementedError

    @staticmethod
    def recompute(*args) -> tuple[Any, ...]:
        """Return the gradients of q, k and v, as `recompute_backward` does."""
        raise NotImplementedError

    @classmethod
    def _forward(cls, ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with_heads = [x.unsqueeze(1) if x.ndim == 3 else x for x in (q, k, v)]
        output, lse = cls.attend(*with_heads, is_causal)
        if q.ndim == 3:
            output, lse = output.squeeze(1), lse.squeeze(1)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.is_causal = is_causal
        return output

    @classmethod
    def _backward(cls, ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        flat = grad_output.ndim == 3
        if flat:
            *saved, grad_output = (x.unsqueeze(1) for x in (*saved, grad_output))
        grads = cls.recompute(*saved, Gradients(output=grad_output), Setting(causal=ctx.is_causal))[:3]
        return *(x.squeeze(1) if flat else x for x in grads), None


class FlashAttentionPyTorchFunc(_FlashAttentionFunc):
    """Tiled attention in PyTorch: `FlashAttentionPyTorchFunc.apply(q, k, v, is_causal)`.

    q [B, M, D] or [B, H, M, D]; k and v alike with N rows. Returns the output, like q; saves the lse [B, (H,) M] fp32.
    The backward pass is compiled by `torch.compile` where that pays.
    """

    @staticmethod
    def attend(q, k, v, is_causal):
        return tiled_attention(q, k, v, Setting(causal=is_causal))

    @staticmethod
    def recompute(*args):
        return recompute_backward(*args)

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        return FlashAttentionPyTorchFunc._forward(ctx, q, k, v, is_causal)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return FlashAttentionPyTorchFunc._backward(ctx, grad_output)


class FlashAttentionTritonFunc(_FlashAttentionFunc):
    """The Triton kernels: `FlashAttentionTritonFunc.apply(q, k, v, is_causal)`; shapes as its PyTorch twin's."""

    @staticmethod
    def attend(q, k, v, is_causal):
        from stage2_triton_forward.split_kv import attention_forward

        return attention_forward(q, k, v, Setting(causal=is_causal))

    @staticmethod
    def recompute(*args):
        from .launch import backward

        return backward(*args)

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        return FlashAttentionTritonFunc._forward(ctx, q, k, v, is_causal)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return FlashAttentionTritonFunc._backward(ctx, grad_output)
