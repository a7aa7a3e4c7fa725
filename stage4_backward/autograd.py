"""FlashAttention as `torch.autograd.Function`s, `.apply(q, k, v, is_causal)`; the forward passes, for now."""

import torch
from torch import Tensor

from stage1_pytorch_tiled.tiled_forward import tiled_attention
from stage2_triton_forward.split_kv import attention_forward


class _RecomputedAttention(torch.autograd.Function):
    """Saves q, k, v, the output and one lse tensor: all that a backward pass by recomputation needs."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        """Return output and lse of [B, H, N, D] inputs."""
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

    @staticmethod
    def backward(ctx, grad_output):
        raise NotImplementedError("the backward pass is stage 4, which is not here yet")


class FlashAttentionPyTorchFunc(_RecomputedAttention):
    """Tiled attention in PyTorch: `FlashAttentionPyTorchFunc.apply(q, k, v, is_causal)`.

    q [B, M, D] or [B, H, M, D]; k and v alike with N rows. Returns the output, like q; saves the lse [B, (H,) M] fp32.
    """

    @staticmethod
    def attend(q, k, v, is_causal):
        return tiled_attention(q, k, v, is_causal)

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        return FlashAttentionPyTorchFunc._forward(ctx, q, k, v, is_causal)


class FlashAttentionTritonFunc(_RecomputedAttention):
    """The Triton forward loop: `FlashAttentionTritonFunc.apply(q, k, v, is_causal)`; shapes as its PyTorch twin's."""

    @staticmethod
    def attend(q, k, v, is_causal):
        return attention_forward(q, k, v, is_causal)

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False):
        return FlashAttentionTritonFunc._forward(ctx, q, k, v, is_causal)
