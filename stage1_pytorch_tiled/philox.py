"""Philox-4x32-10 in PyTorch: the same random bits for the same counters as in the Triton kernels."""

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def keep_mask(seed: int, batch_head: Tensor, q_idx: Tensor, k_idx: Tensor, dropout_p: float) -> Tensor:
    """Return which attention weights dropout keeps.

    Args:
        seed: 64-bit key of the generator.
        batch_head: int64, number batch·Hq + head of each row of the matrix.
        q_idx: int64, query positions.
        k_idx: int64, key positions; the three broadcast to the result's shape.
        dropout_p: probability of dropping, in [0, 1).

    Returns:
        bool, True for a kept weight. A function of seed and position alone: tile sizes and order do not matter.

    Source: Salmon et al. 2011 (Philox); dropout in FlashAttention (Dao et al. 2022), Algorithm 2.
    """
    counters = list(torch.broadcast_tensors(k_idx, q_idx, batch_head, torch.zeros_like(k_idx)))
    keys = [seed & _LOW_32, (seed >> 32) & _LOW_32]
    for _ in range(10):
        c0, c1, c2, c3 = counters
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_2, low_2 = _multiply(c2, _MULTIPLIERS[1])
        counters = [high_2 ^ c1 ^ keys[0], low_2, high_0 ^ c3 ^ keys[1], low_0]
        keys = [(key + step) & _LOW_32 for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return counters[0] >= drop_threshold(dropout_p)


def drop_threshold(dropout_p: float) -> int:
    """Return the 32-bit threshold below which a random word means 'drop'."""
    return round(dropout_p * 2**32)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of x·factor, for x in [0, 2³²) held in int64."""
    x_high, x_low = x >> 16, x & 0xFFFF
    low_product = x_low * factor  # < 2⁴⁸
    high_product = x_high * factor + (low_product >> 16)  # < 2⁴⁹
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)
