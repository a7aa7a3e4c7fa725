"""Gradients of the raw sums in O(N·D): what a query gets is a sum of keys, what a key gets is a sum of queries."""

import torch
from torch import Tensor

from stage1_pytorch_tiled.setting import FULL, Setting
from stage2_triton_forward.describe import mask_sides, readable
from stage2_triton_forward.launcher import launch
from stage2_triton_forward.tile_config import cdiv
from stage3_scores_and_sums.linear_sums import key_ends, query_ends, summed_chunks

from .linear_grad_kernel import interval_vector_kernel
from .tile_config import interval_vector_config


def linear_row_sum_grads(
    q: Tensor,
    k: Tensor,
    grad: Tensor,
    setting: Setting = FULL,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k, fp32, from that of the row sums.

    With r_i = s·q_i·Σ_j k_j over the keys that query i sees: dq_i = s·g_i·Σ_j k_j and dk_j = s·Σ_i g_i·q_i.

    Args:
        grad: [B, Hq, M], of the row sums; the others as in `linear_row_sum`.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    sides = mask_sides(n_q, n_k, setting.causal, setting.window)
    grad = grad.float()
    grad_q = _interval_vectors(q, k, key_ends(sides), (0, n_k), setting, False, factor=grad)
    weighted = q.float() * grad[..., None]
    grad_k = _interval_vectors(k, weighted, query_ends(sides), (0, n_q), setting, True)
    return grad_q, grad_k


def linear_col_sum_grads(
    q: Tensor,
    k: Tensor,
    grad: Tensor,
    setting: Setting = FULL,
    *,
    q_begin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k, fp32, from that of the column sums of queries from q_begin on.

    With c_j = s·k_j·Σ_i q_i over the queries that see key j: dk_j = s·g_j·Σ_i q_i and dq_i = s·Σ_j g_j·k_j.

    Args:
        grad: [B, Hk, k_stop], of the column sums; the others as in `linear_col_sum`.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    sides = mask_sides(n_q, n_k, setting.causal, setting.window)
    grad = torch.nn.functional.pad(grad.float(), (0, n_k - grad.shape[2]))
    weighted = k.float() * grad[..., None]
    grad_q = _interval_vectors(q, weighted, key_ends(sides), (0, n_k), setting, False)
    grad_q[:, :, :q_begin] = 0
    grad_k = _interval_vectors(k, q, query_ends(sides), (q_begin, n_q), setting, True, factor=grad)
    return grad_q, grad_k


def _interval_vectors(x, y, ends, counted, setting, x_is_keys, factor=None) -> Tensor:
    """Return [B, Hx, Nx, D] fp32: scale·factor_i·Σ y_t over i + ends[0] <= t < i + ends[1], t within `counted`."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if out.numel() == 0 or counted[0] >= counted[1] or y.numel() == 0:
        return out.zero_()
    chunks = summed_chunks(x, y, ends, counted, setting.key_padding_mask, x_is_keys)
    launch(
        interval_vector_kernel,
        (cdiv(x.shape[2], chunks.config.chunk), x.shape[0] * chunks.n_sums),
        interval_vector_config(),
        chunks.y_desc,
        readable(factor),
        out,
        chunks.rows,
        chunks.ends,
        x.shape[2],
        setting.scale(x.shape[3]),
        HEAD_DIM=x.shape[3],
        N_SUMS=chunks.n_sums,
        X_GROUP=x.shape[1] // chunks.n_sums,
        Y_HEADS=y.shape[1] // chunks.n_sums,
        HAS_FACTOR=factor is not None,
    )
    return out
