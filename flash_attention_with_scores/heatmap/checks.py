"""Checks of what the heatmaps are given: every error names the argument, what was given and what is allowed."""

import operator

import numpy as np
import torch


def as_numbers(given, name):
    """Return a tensor or array of real numbers as float64; its shape is the caller's to check."""
    if isinstance(given, torch.Tensor):
        real = given.dtype != torch.bool and not given.is_complex()
    elif isinstance(given, np.ndarray):
        real = given.dtype.kind in "fiu"
    else:
        raise TypeError(f"{name} must be a torch tensor or numpy array; got {type(given).__name__}")
    if not real:
        raise TypeError(f"{name} must hold floats or integers; got dtype {given.dtype}")
    return torch.as_tensor(given).detach().cpu().to(torch.float64).numpy()


def as_matrix(given, name) -> np.ndarray:
    """Return one head's scores or weights as `[M, N]`."""
    values = as_numbers(given, name)
    if values.size == 0 or values.ndim not in (2, 4) or values.shape[:-2] not in ((), (1, 1)):
        raise ValueError(f"{name} must be one head's non-empty [M, N] or [1, 1, M, N]; got shape {list(values.shape)}")
    return values.reshape(values.shape[-2:])


def as_sums(given, length, name):
    """Return the sums that a margin draws as `[length]`; leading dimensions of size 1 are dropped."""
    values = as_numbers(given, name)
    if values.size != length or values.shape[-1:] != (length,):
        raise ValueError(f"{name} must have shape [{length}]; got {list(values.shape)}")
    return values.reshape(length)


def causal_visible(causal, n_q, n_k):
    """Return `[n_q, n_k]` bool, True = allowed."""
    return np.tri(n_q, n_k, n_k - n_q, dtype=bool) if causal else np.ones((n_q, n_k), dtype=bool)


def as_visible(given, n_q, n_k):
    """Return a mask as a bool array `[n_q, n_k]`."""
    if not isinstance(given, (torch.Tensor, np.ndarray)):
        raise TypeError(f"visible must be a bool tensor or array; got {type(given).__name__}")
    if given.dtype not in (torch.bool, np.bool_):
        raise TypeError(f"visible must be bool, True = allowed; got dtype {given.dtype}")
    if tuple(given.shape) not in ((n_q, n_k), (1, 1, n_q, n_k)):
        raise ValueError(f"visible must have the scores' shape [{n_q}, {n_k}]; got {list(given.shape)}")
    return torch.as_tensor(given).cpu().numpy().reshape(n_q, n_k)


def as_names(given, count, name, what):
    """Return `count` strings, control characters escaped so that each stays on its line; None stays None."""
    if given is None:
        return None
    if isinstance(given, str):
        raise TypeError(f"{name} must be a list of strings, one per {what}; got one string")
    names = [str(item) for item in given]
    if len(names) != count:
        raise ValueError(f"{name} must name {count} {what} positions, one string each; got {len(names)}")
    return ["".join(char if char.isprintable() else repr(char)[1:-1] for char in item) for item in names]


def as_pairs(given, name) -> list[tuple[int, int]]:
    """Return a list of pairs of ints."""
    try:
        return [(operator.index(first), operator.index(second)) for first, second in given]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a list of pairs of integers; got {given!r:.80}") from error


def as_count(given, name):
    """Return a positive int."""
    try:
        count = operator.index(given)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer; got {given!r}") from error
    if count < 1:
        raise ValueError(f"{name} must be at least 1; got {count}")
    return count
