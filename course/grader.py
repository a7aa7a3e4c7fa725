"""Decides whether a result is right: against float64, allowing the error that the formula itself makes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Comparison(NamedTuple):
    """A result beside the truth."""

    max_error: float  # largest absolute difference from the float64 oracle; inf where NaN or ±inf disagree
    allowed: float  # twice the naive formula's own error, plus a few eps of the result's dtype
    ok: bool


def compare(
    actual: Tensor,
    oracle: Tensor,
    naive: Tensor,
    eps_factor: float = 8.0,
    of_logits: float = 0.0,
    at_least: float = 0.0,
) -> Comparison:
    """Compare a result with the float64 oracle.

    Args:
        actual: the result, any floating dtype.
        oracle: the same quantity computed naively from the same inputs in float64.
        naive: the same quantity computed naively in the inputs' own dtype.
        eps_factor: how many units of rounding of actual's dtype, at the oracle's largest magnitude, are allowed on top.
        of_logits: rounding of the logits behind the result, which may be larger than they are where q·k cancels; a
            result follows in proportion to itself (as weights and what they weigh do), or to 1 (as the lse does).
        at_least: a magnitude that rounding is measured by where the oracle's is smaller: 1 for a logarithm, which is
            off by as much as its argument is off relative to itself, however near to 0 it lies.

    Returns:
        Comparison; `ok` is False for a wrong shape, and for NaN or ±inf where the oracle has another value.
    """
    if actual.shape != oracle.shape:
        return Comparison(math.inf, 0.0, False)
    oracle = oracle.detach().double().cpu()
    largest = oracle[torch.isfinite(oracle)].abs().max().item() if torch.isfinite(oracle).any() else 0.0
    rounding = eps_factor * torch.finfo(actual.dtype).eps * max(largest, at_least) + of_logits * max(largest, 1.0)
    naive_error = max_error(naive, oracle)
    allowed = (2 * naive_error if math.isfinite(naive_error) else 0.0) + rounding
    error = max_error(actual, oracle)
    return Comparison(error, allowed, error <= allowed)


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Return the largest absolute difference; inf where exactly one is NaN, or an infinity differs."""
    actual, oracle = actual.detach().double().cpu(), oracle.detach().double().cpu()
    agree = (actual == oracle) | (torch.isnan(actual) & torch.isnan(oracle))
    difference = (actual - oracle).abs().masked_fill(agree, 0)
    return difference.nan_to_num(nan=math.inf).max().item() if difference.numel() else 0.0
