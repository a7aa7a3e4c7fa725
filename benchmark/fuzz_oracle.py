"""What the fuzzer holds results against: attention and all that goes with it, from the formulas, in float64.

It was written apart from the course's oracle, imports nothing of the library but the documented random bits of dropout,
and leaves gradients to PyTorch's autograd. Each field is a method, so that a case pays for what it asks.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_pytorch_tiled.philox import keep_mask


class Region(NamedTuple):
    """The part of the matrix that column sums count."""

    q_begin: int = 0
    q_stop: int | None = None
    k_stop: int | None = None
    per_query_head: bool = False


WHOLE = Region()


class Truth:
    """One attention problem in float64; tensors that require gradients make every field differentiable."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window=None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        seed: int = 0,
        region: Region = WHOLE,
    ):
        """Take q [B, Hq, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv] and sinks [Hq] in float64, padding [B, N] bool."""
        self.q, self.k, self.v, self.sinks = q, k, v, sinks
        self.scale = q.shape[3] ** -0.5 if sm_scale is None else float(sm_scale)
        self.softcap, self.region = softcap, region
        self.n_q, self.n_k, self.n_kv_heads = q.shape[2], k.shape[2], k.shape[1]
        self.kv_head = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])  # of each query head
        self.distance = (torch.arange(self.n_q) + self.n_k - self.n_q)[:, None] - torch.arange(self.n_k)[None, :]
        self.visible = self._visible(causal, window, padding)
        self.blind = ~self.visible.any(-1)  # [B, 1, M]
        self.dropout_factor = self._dropout_factor(dropout_p, seed)
        self.raw = self.scale * torch.einsum("bhid,bhjd->bhij", q, k[:, self.kv_head])
        self.weights, self.sink_weight, self._lse = self._softmax()

    def _visible(self, causal, window, padding) -> Tensor:
        """Return [B, 1, M, N] bool."""
        allowed = self.distance >= (0 if causal else -self.n_q - self.n_k)
        for side, towards in zip(window if isinstance(window, tuple) else (window, window), (1, -1), strict=True):
            if side is not None:
                allowed = allowed & (towards * self.distance <= side)
        allowed = allowed.expand(self.q.shape[0], 1, -1, -1)
        return allowed if padding is None else allowed & padding[:, None, None]

    def _dropout_factor(self, dropout_p, seed) -> Tensor | None:
        if not dropout_p:
            return None
        batch_head = torch.arange(self.q.shape[0] * self.q.shape[1]).view(*self.q.shape[:2], 1, 1)
        kept = keep_mask(seed, batch_head, torch.arange(self.n_q)[:, None], torch.arange(self.n_k), dropout_p)
        return kept.double() / (1 - dropout_p)

    def _softmax(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, the sink's weight and the lse; a sink is one more column, which has no value."""
        logits = self.raw if self.softcap is None else self.softcap * torch.tanh(self.raw / self.softcap)
        logits = logits.masked_fill(~self.visible, -torch.inf)
        sinks = logits.new_full(self.q.shape[1:2], -torch.inf) if self.sinks is None else self.sinks
        row = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        row = row.masked_fill(self.blind[..., None], -torch.inf)
        largest = row.detach().amax(-1, keepdim=True)
        largest = largest.masked_fill(largest.isinf(), 0)
        powers = torch.exp(row - largest)
        total = powers.sum(-1, keepdim=True).masked_fill(self.blind[..., None], 1)
        weights = powers / total
        lse = (total.log() + largest)[..., 0].masked_fill(self.blind, -torch.inf)
        return weights[..., :-1], weights[..., -1], lse

    @cached_property
    def counted(self) -> Tensor:
        """[M, N], 1 where column sums count."""
        region = torch.zeros(self.n_q, self.n_k, dtype=torch.float64)
        region[self.region.q_begin : self.region.q_stop, : self.region.k_stop] = 1
        return region

    def columns(self, matrix: Tensor) -> Tensor:
        """Return the sums [B, Hk or Hq, k_stop] of the counted part of a matrix [B, Hq, M, N]."""
        sums = torch.einsum("bhij,ij->bhj", matrix, self.counted)[..., : self.region.k_stop]
        return sums if self.region.per_query_head else self.of_groups(sums, torch.sum)

    def of_groups(self, x: Tensor, reduce) -> Tensor:
        """Reduce [B, Hq, …] to [B, Hk, …]."""
        return reduce(x.unflatten(1, (self.n_kv_heads, x.shape[1] // self.n_kv_heads)), 2)

    @property
    def kept(self) -> Tensor:
        """The weights that reach the output."""
        return self.weights if self.dropout_factor is None else self.weights * self.dropout_factor

    def output(self) -> Tensor:
        """Return Σ_j P_ij·v_j."""
        return torch.einsum("bhij,bhjd->bhid", self.kept, self.v[:, self.kv_head])

    def lse(self) -> Tensor:
        """Return ln Σ_j e^{S_ij}, the sink's term included."""
        return self._lse

    def scores(self) -> Tensor:
        """Return the raw scores."""
        return self.raw * self.visible

    def row_sum(self) -> Tensor:
        """Return the raw scores of each query, added up."""
        return self.scores().sum(-1)

    def col_sum(self) -> Tensor:
        """Return the raw scores of each key, added up over the region."""
        return self.columns(self.scores())

    def weight_sum(self) -> Tensor:
        """Return the weights of each key, added up over the region."""
        return self.columns(self.weights)

    def entropy(self) -> Tensor:
        """Return -Σ_j p·ln p."""
        return -(self.weights * self.weights.masked_fill(self.weights == 0, 1).log()).sum(-1)

    def max_weight(self) -> Tensor:
        """Return the largest weight of each query."""
        return _largest(self.weights, -1, 0.0)

    def mean_distance(self) -> Tensor:
        """Return Σ_j p·|distance| / Σ_j p."""
        total = self.weights.sum(-1)
        return (self.weights * self.distance.abs()).sum(-1) / total.masked_fill(total == 0, 1)

    def row_squares(self) -> Tensor:
        """Return Σ_j p²."""
        return (self.weights**2).sum(-1)

    def row_largest_logit(self, start: float = -100.0) -> Tensor:
        """Return each query's largest raw score, or `start`."""
        return _largest(self.raw.masked_fill(~self.visible, -torch.inf), -1, start)

    def col_squares(self) -> Tensor:
        """Return Σ_i p², of a head group together or of each query head."""
        return self.columns(self.weights**2)

    def col_max_weight(self) -> Tensor:
        """Return the largest weight that each key gets."""
        return self._largest_of_columns(self.weights, 0.0)

    def col_largest_logit(self, start: float = -100.0) -> Tensor:
        """Return each key's largest raw score, or `start`."""
        return self._largest_of_columns(self.raw.masked_fill(~self.visible, -torch.inf), start)

    def _largest_of_columns(self, matrix: Tensor, start: float) -> Tensor:
        largest = _largest(matrix, -2, start)
        return largest if self.region.per_query_head else self.of_groups(largest, torch.amax)


def _largest(x: Tensor, dim: int, start: float) -> Tensor:
    """Return the largest element along a dimension that may be empty, at least `start`."""
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat([x, x.new_full(shape, start)], dim).amax(dim)
