"""Gradients of the raw sums in O(N·D): what a query gets is a sum of keys, what a key gets is a sum of queries."""

import torch
import triton
from torch import Tensor

from stage1_pytorch_tiled.tiled_forward import Window
from stage2_triton_forward.launch import default_scale, device_of, mask_sides, readable
from stage3_scores_and_sums.linear_sums import key_ends, query_ends, summed_chunks

from .linear_grad_kernel import interval_vector_kernel


def linear_row_sum_grads(
    q: Tensor,
    k: Tensor,
    grad: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    window: Window = None,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k, fp32, from that of the row sums.

    With r_i = s·q_i·Σ_j k_j over the keys that query i sees: dq_i = s·g_i·Σ_j k_j and dk_j = s·Σ_i g_i·q_i.

    Args:
        grad: [B, Hq, M], of the row sums; the others as in `linear_row_sum`.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    sides = mask_sides(n_q, n_k, causal, window)
    scale, grad = default_scale(q, sm_scale), grad.float()
    of_keys = {"key_padding_mask": key_padding_mask, "scale": scale}
    grad_q = _interval_vectors(q, k, key_ends(sides), (0, n_k), False, factor=grad, **of_keys)
    weighted = q.float() * grad[..., None]
    grad_k = _interval_vectors(k, weighted, query_ends(sides), (0, n_q), True, **of_keys)
    return grad_q, grad_k


def linear_col_sum_grads(
    q: Tensor,
    k: Tensor,
    grad: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    window: Window = None,
    key_padding_mask: Tensor | None = None,
    q_begin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k, fp32, from that of the column sums of queries from q_begin on.

    With c_j = s·k_j·Σ_i q_i over the queries that see key j: dk_j = s·g_j·Σ_i q_i and dq_i = s·Σ_j g_j·k_j.

    Args:
        grad: [B, Hk, k_stop], of the column sums; the others as in `linear_col_sum`.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    sides = mask_sides(n_q, n_k, causal, window)
    grad = torch.nn.functional.pad(grad.float(), (0, n_k - grad.shape[2]))
    of_keys = {"key_padding_mask": key_padding_mask, "scale": default_scale(q, sm_scale)}
    weighted = k.float() * grad[..., None]
    grad_q = _interval_vectors(q, weighted, key_ends(sides), (0, n_k), False, **of_keys)
    grad_q[:, :, :q_begin] = 0
    grad_k = _interval_vectors(k, q, query_ends(sides), (q_begin, n_q), True, factor=grad, **of_keys)
    return grad_q, grad_k


def _interval_vectors(x, y, ends, counted, x_is_keys, *, key_padding_mask, scale, factor=None) -> Tensor:
    """Return [B, Hx, Nx, D] fp32: scale·factor_i·Σ y_t over i + ends[0] <= t < i + ends[1], t within `counted`."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if out.numel() == 0 or counted[0] >= counted[1] or y.numel() == 0:
        return out.zero_()
    chunks = summed_chunks(x, y, ends, counted, key_padding_mask, x_is_keys)
    with device_of(x):
        interval_vector_kernel[(triton.cdiv(x.shape[2], chunks.config.chunk), x.shape[0] * chunks.n_sums)](
            chunks.y_desc,
            readable(factor, out),
            out,
            chunks.rows,
            chunks.ends,
            x.shape[2],
            scale,
            HEAD_DIM=x.shape[3],
            N_SUMS=chunks.n_sums,
            X_GROUP=x.shape[1] // chunks.n_sums,
            Y_HEADS=y.shape[1] // chunks.n_sums,
            HAS_FACTOR=factor is not None,
            num_warps=8,
            num_stages=1,
        )
    return out
