"""Raw row, column and cross-token sums in O(N·D): scores are linear in q and in k, so sums may be taken first."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stage1_pytorch_tiled.tiled_forward import Window
from stage2_triton_forward.launch import default_scale, descriptor, device_of, mask_sides, padded_head_dim

from .linear_sum_kernel import Rows, chunk_sum_kernel, interval_sum_kernel, prefix_sum_kernel
from .tile_config import linear_sum_config


def linear_row_sum(
    q: Tensor,
    k: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    window: Window = None,
    key_padding_mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return Σ_j s·q_i·k_j = s·q_i·(Σ_j k_j) over the keys j that query i sees, [B, Hq, M] fp32.

    Args: q [B, Hq, M, D], k [B, Hk, N, D] and the mask as in `stage2_triton_forward.launch.forward`; out: where to.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    behind = n_k - n_q  # query i stands at key i + behind
    left, right = mask_sides(n_q, n_k, causal, window)
    ends = (None if left is None else behind - left, None if right is None else behind + right + 1)
    out = q.new_empty(q.shape[:3], dtype=torch.float32) if out is None else out
    return _interval_sums(q, k, ends, (0, n_k), key_padding_mask, False, default_scale(q, sm_scale), out)


def linear_col_sum(
    q: Tensor,
    k: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    window: Window = None,
    key_padding_mask: Tensor | None = None,
    q_begin: int = 0,
    k_stop: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return Σ_i s·q_i·k_j = s·(Σ_i q_i)·k_j over the queries i >= q_begin, of all heads of k's group, that see key j.

    Args: as in `linear_row_sum`; q_begin and k_stop cut out the region of a cross-token sum.

    Returns:
        [B, Hk, k_stop] fp32.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    behind = n_k - n_q
    left, right = mask_sides(n_q, n_k, causal, window)
    ends = (None if right is None else -behind - right, None if left is None else -behind + left + 1)
    k_stop = n_k if k_stop is None else k_stop
    out = q.new_empty(*k.shape[:2], k_stop, dtype=torch.float32) if out is None else out
    return _interval_sums(k, q, ends, (q_begin, n_q), key_padding_mask, True, default_scale(q, sm_scale), out)


def _interval_sums(x, y, ends, counted, key_padding_mask, x_is_keys, scale, out):
    """Fill out [B, Hx, n] with scale·x_i·Σ y_t over i + ends[0] <= t < i + ends[1], t within `counted`."""
    if out.numel() == 0:
        return out
    if counted[0] >= counted[1] or y.numel() == 0:
        return out.zero_()
    batch, x_heads, y_heads = x.shape[0], x.shape[1], y.shape[1]
    n_sums = min(x_heads, y_heads)  # one for each key head
    config = linear_sum_config(x)
    padded = key_padding_mask is not None
    padding = key_padding_mask.to(torch.uint8).contiguous() if padded else out
    block_d = padded_head_dim(x.shape[3])
    constants = (padded and x_is_keys, padded and not x_is_keys, config.chunk, block_d, config.fp32_precision)
    n_keys = (x if x_is_keys else y).shape[2]
    rows = Rows(*counted, padding, n_keys, *map(tl.constexpr, constants))
    y_desc = descriptor(y, config.chunk)
    left, right = ends
    with device_of(x):
        no_right = right is None
        to_left = _prefix_sums(y, y_desc, rows, left or 0, n_sums, config) if no_right or left is not None else None
        to_right = to_left if no_right else _prefix_sums(y, y_desc, rows, right, n_sums, config)
        to_left = to_right if to_left is None else to_left
        interval_sum_kernel[(triton.cdiv(out.shape[2], config.chunk), batch * n_sums)](
            descriptor(x, config.chunk),
            y_desc,
            to_left[0],
            to_right[0],
            out,
            rows,
            left or 0,
            right or 0,
            to_left[1],
            to_right[1],
            to_left[0].shape[2],
            to_right[0].shape[2],
            out.shape[2],
            scale,
            N_SUMS=n_sums,
            X_GROUP=x_heads // n_sums,
            Y_HEADS=y_heads // n_sums,
            HAS_LEFT=left is not None,
            HAS_RIGHT=right is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def _prefix_sums(y, y_desc, rows, end, n_sums, config):
    """Sum y in chunks that start where ends do; return the prefix sums [B, n_sums, chunks, BLOCK_D] and the start."""
    first = -(-end % config.chunk)  # in (-chunk, 0], a whole number of chunks away from `end`
    n_chunks = triton.cdiv(y.shape[2] - first, config.chunk)
    block_d = rows.BLOCK_D.value
    sums = torch.empty(y.shape[0], n_sums, n_chunks, block_d, dtype=torch.float64, device=y.device)
    heads = y.shape[0] * n_sums
    chunk_sum_kernel[(n_chunks, heads)](
        y_desc, sums, rows, first, N_SUMS=n_sums, Y_HEADS=y.shape[1] // n_sums, num_warps=config.num_warps
    )
    prefix_sum_kernel[(heads, block_d // 16)](sums, n_chunks, BLOCK=64, BLOCK_D=block_d, WIDTH=16, num_warps=4)
    return sums, first
