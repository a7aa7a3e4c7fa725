"""Which keys a full cache keeps: H2O, CAB, SnapKV, StreamingLLM, random, and everything.

A policy is any object with the members of `Policy`. The ones here are dataclasses, and without state but for `Random`,
which has a generator. The kept set is chosen for every sequence and every key head separately.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1  # the position of a key that is padding


class Policy(Protocol):
    """What an evicting cache asks of a policy."""

    uses_scores: bool  # False leaves out the second pass that column sums cost
    window: int | None  # sums of about this many of the last queries; None for all queries so far

    def keep(self, scores: Tensor | None, positions: Tensor, budget: int) -> Tensor:
        """Choose the keys to keep.

        Args:
            scores: [B, Hk, N] fp32, the attention that each key got, summed over queries and over the head group, 0 for
                padding; None where `uses_scores` is False.
            positions: [B, Hk, N] int64: where each key stood in its sequence, ascending, and `PADDING` for padding,
                to be kept only where a sequence has fewer tokens than the budget.
            budget: how many to keep, from 1 to N.

        Returns:
            [B, Hk, budget] int64, indices into the last dimension, ascending and without repetition.
        """
        ...


def part(share: float, budget: int) -> int:
    """Return a share of the budget, rounded, half up."""
    return int(share * budget + 0.5)


def most_recent(positions: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` most recent tokens, [B, Hk, count]."""
    return positions.topk(count, dim=-1).indices


def largest(values: Tensor, positions: Tensor, count: int, taken: Tensor | None = None) -> Tensor:
    """Return the indices of the `count` largest values that are not taken, [B, Hk, count]; padding comes last."""
    values = values.masked_fill(positions == PADDING, torch.finfo(values.dtype).min)
    if taken is not None:
        values = values.scatter(-1, taken, -torch.inf)
    return values.topk(count, dim=-1).indices


def union(*indices: Tensor) -> Tensor:
    """Join disjoint sets of indices, ascending."""
    return torch.cat(indices, dim=-1).sort(dim=-1).values


@dataclass(frozen=True)
class Full:
    """Keep everything, whatever the budget."""

    uses_scores: ClassVar[bool] = False
    window: ClassVar[None] = None

    def keep(self, scores: Tensor | None, positions: Tensor, budget: int) -> Tensor:
        """See `Policy.keep`; returns N indices instead of `budget`."""
        return torch.arange(positions.shape[-1], device=positions.device).expand_as(positions)


@dataclass
class Random:
    """Keep a uniformly random set of keys.

    Args:
        seed: of the generator that all calls draw from, in their order.
    """

    seed: int = 0
    uses_scores: ClassVar[bool] = False
    window: ClassVar[None] = None

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def keep(self, scores: Tensor | None, positions: Tensor, budget: int) -> Tensor:
        """See `Policy.keep`."""
        drawn = torch.rand(positions.shape, generator=self.generator).to(positions.device)
        return union(largest(drawn, positions, budget))


@dataclass(frozen=True)
class StreamingLLM:
    """Keep the first tokens, which soak up attention that has nowhere to go, and the most recent ones.

    Args:
        sinks: how many first tokens; no more than the budget leaves beside one recent token.

    Source: StreamingLLM (Xiao et al. 2023), section 3.2. Positions are not counted anew within the cache.
    """

    sinks: int = 4
    uses_scores: ClassVar[bool] = False
    window: ClassVar[None] = None

    def __post_init__(self):
        _check_count("sinks", self.sinks, 0)

    def keep(self, scores: Tensor | None, positions: Tensor, budget: int) -> Tensor:
        """See `Policy.keep`."""
        n_recent = max(budget - self.sinks, 1)
        recent = most_recent(positions, n_recent)
        return union(recent, largest(-positions.float(), positions, budget - n_recent, recent))


@dataclass(frozen=True)
class H2O:
    """Keep the most recent tokens, and of the others the heavy hitters: those that got the most attention so far.

    Args:
        recent: share of the budget that goes to the most recent tokens, from 0 to 1.

    Source: H2O (Zhang et al. 2023), Algorithm 1; half of the budget for recent tokens as in its experiments.
    """

    recent: float = 0.5
    uses_scores: ClassVar[bool] = True
    window: ClassVar[None] = None

    def __post_init__(self):
        _check_shares(recent=self.recent)

    def keep(self, scores: Tensor | None, positions: Tensor, budget: int) -> Tensor:
        """See `Policy.keep`."""
        assert scores is not None  # `uses_scores`
        n_recent = part(self.recent, budget)
        recent = most_recent(positions, n_recent)
        return union(recent, largest(scores, positions, budget - n_recent, recent))


@dataclass(frozen=True)
class CAB:
    """Keep recent tokens, heavy hitters, and bridges between them: tokens of median attention.

    Local tokens are chosen first, important ones of what is left, bridges of what is left then: with the lower median m
    of the remaining scores s, those of the smallest |s_j − m|. That takes O(N), without a look at pairs of tokens.

    Args:
        local, bridge, importance: shares of the budget, which add up to 1; what rounding leaves goes to importance.

    Source: the three-component policy published as CAB (curvature-aware block-sparse attention); the median stands in
        for the curvature of the attention graph.
    """

    local: float = 0.3
    bridge: float = 0.2
    importance: float = 0.5
    uses_scores: ClassVar[bool] = True
    window: ClassVar[None] = None

    def __post_init__(self):
        _check_shares(local=self.local, bridge=self.bridge, importance=self.importance)
        if abs(self.local + self.bridge + self.importance - 1) > 1e-6:
            raise ValueError(f"local, bridge and importance must add up to 1, got {self}")

    def keep(self, scores: Tensor | None, positions: Tensor, budget: int) -> Tensor:
        """See `Policy.keep`."""
        assert scores is not None  # `uses_scores`
        n_local = part(self.local, budget)
        n_bridge = min(part(self.bridge, budget), budget - n_local)
        local = most_recent(positions, n_local)
        important = largest(scores, positions, budget - n_local - n_bridge, local)
        taken = torch.cat([local, important], dim=-1)
        remaining = scores.masked_fill(positions == PADDING, torch.nan).scatter(-1, taken, torch.nan)
        median = remaining.nanmedian(dim=-1, keepdim=True).values.nan_to_num()  # NaN where nothing remains
        return union(taken, largest(-(scores - median).abs(), positions, n_bridge, taken))


@dataclass(frozen=True)
class SnapKV:
    """Keep the last queries' own tokens, and of the others those that these queries attend to, with their neighbours.

    After a pass of fewer than `window` queries (a decoded token) older sums fade: each query takes 1/window of them.

    Args:
        window: how many last queries are observed; no more tokens than the budget leaves beside one other are kept.
        kernel: over how many neighbouring keys scores are pooled, odd.
        pooling: "avg" or "max".

    Source: SnapKV (Li et al. 2024), Listing 1; the fading is ours, it evicts after the prompt only.
    """

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    uses_scores: ClassVar[bool] = True

    def __post_init__(self):
        _check_count("window", self.window, 1)
        _check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if self.pooling not in ("avg", "max"):
            raise ValueError(f'pooling must be "avg" or "max", got {self.pooling!r}')

    def keep(self, scores: Tensor | None, positions: Tensor, budget: int) -> Tensor:
        """See `Policy.keep`."""
        assert scores is not None  # `uses_scores`
        n_recent = max(min(self.window, budget - 1), 1)
        recent = most_recent(positions, n_recent)
        older = scores.scatter(-1, recent, 0.0)  # else the window's keys would lend their scores to their neighbours
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled = pool(older, self.kernel, stride=1, padding=self.kernel // 2)
        return union(recent, largest(pooled, positions, budget - n_recent, recent))


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share from 0 to 1, got {share!r}")


def _check_count(name: str, count: int, at_least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < at_least:
        raise ValueError(f"{name} must be an int of at least {at_least}, got {count!r}")
