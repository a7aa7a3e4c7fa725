"""The forward pass as an operator that PyTorch knows: torch.compile, opcheck and CUDA graphs can work with it."""

import torch
from torch import Tensor

from .launch import output_dtype
from .split_kv import attention_forward


@torch.library.custom_op("flash_attention_with_scores::forward", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sm_scale: float | None,
    dropout_p: float,
    seed: int,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    descale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output [B, Hq, M, Dv] and lse [B, Hq, M]; arguments as in `launch.forward`, the window in two parts."""
    return attention_forward(
        q,
        k,
        v,
        causal,
        sm_scale,
        dropout_p,
        seed,
        window=(window_left, window_right),
        softcap=softcap,
        sinks=sinks,
        key_padding_mask=key_padding_mask,
        descale=descale,
    )


@forward_op.register_fake
def _forward_shapes(
    q, k, v, causal, sm_scale, dropout_p, seed, window_left, window_right, softcap, sinks, key_padding_mask, descale
):
    return q.new_empty(*q.shape[:3], v.shape[3], dtype=output_dtype(q)), q.new_empty(q.shape[:3], dtype=torch.float32)
