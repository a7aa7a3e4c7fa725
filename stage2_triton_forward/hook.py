"""The seam of the forward loop: what a caller may add to attention without a second copy of it."""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl


class Place(NamedTuple):
    """Where a program of the forward loop stands: the tile of queries that it owns, and the hook's descriptor."""

    batch: int
    head: int
    batch_head: int  # batch·Hq + head
    q_start: int
    q_idx: tl.tensor  # [BLOCK_M], positions from q_start on; the last may lie past the last query
    q_tile: tl.tensor  # [BLOCK_M, BLOCK_D], 0 past the last query; with the sign of the scale
    n_q: int
    offset: int  # query i stands at key i + offset
    hook_desc: tl.tensor_descriptor  # of `hook_tensor`: the kernel's arguments cannot hold one within a tuple


class Hook(NamedTuple):
    """Six `@triton.jit` functions, compiled into the loop; each but the first gets `args` first.

    What START returns is carried from tile to tile: ON_LOGITS and ON_WEIGHTS return it, changed or not.
    """

    args: tuple  # a NamedTuple, best
    ROWS: tl.constexpr
    START: tl.constexpr
    ORDER: tl.constexpr
    ON_LOGITS: tl.constexpr
    ON_WEIGHTS: tl.constexpr
    FINISH: tl.constexpr

    def given(self, args: tuple) -> "Hook":
        """Return this hook with its `args`, such as where to store what it finds."""
        return self._replace(args=args)


@triton.jit
def longest_first(turn, m_blocks):
    """ROWS: return which tile of queries is taken in this turn; under a causal mask the last ones are the longest."""
    return m_blocks - 1 - turn


@triton.jit
def carry_nothing(args, place):
    """START: return what a tile of rows carries along its keys; a tuple."""
    return ()


@triton.jit
def in_order(args, k_start, begin, stop, place, BLOCK_N: tl.constexpr):
    """ORDER: return which of the tiles from `begin` to `stop` to visit when it is the turn of `k_start`."""
    return k_start


@triton.jit
def ignore_logits(args, carry, logits, visible, place, k_start):
    """ON_LOGITS: gets sm_scale·q·kᵀ [BLOCK_M, BLOCK_N], before softcap and mask, and who sees whom."""
    return carry


@triton.jit
def ignore_weights(args, carry, before, after, logits, weights, scale_log2, place, k_start):
    """ON_WEIGHTS: gets the softmax state before and after a tile, and its weights = 2^(logits·scale_log2 - max).

    They are neither normalised nor dropped yet; a masked logit is -inf.
    """
    return carry


@triton.jit
def finish_nothing(args, carry, state, lse_log2, begin, stop, place):
    """FINISH: gets the final state and its lse in base 2; the tiles visited are those from `begin` to `stop`."""


@lru_cache(maxsize=None, typed=True)
def constant(value) -> tl.constexpr:
    """Wrap a compile-time value for a kernel: the same object each time, which the launcher recognises at once."""
    return tl.constexpr(value)


def make_hook(args: tuple = (), **functions: triton.JITFunction) -> Hook:
    """Return a hook with the functions named (such as on_logits=…), and those of plain attention for the others."""
    return PLAIN._replace(args=args, **{name.upper(): constant(function) for name, function in functions.items()})


_PLAIN = (longest_first, carry_nothing, in_order, ignore_logits, ignore_weights, finish_nothing)
PLAIN = Hook((), *map(constant, _PLAIN))
