"""How far a right result may be from the truth: a few units of rounding of the terms that it is made of, element-wise.

A row's weights are off by the rounding of its logits, relative to themselves; a logit by that of its terms, which may
be much larger than it is. Whatever is added up is off by so much of the sum of absolute terms. The naive formula makes
errors of this size, so that no right algorithm needs more.
"""

import torch
from torch import Tensor

from benchmark.fuzz_oracle import Truth

ROUNDINGS = 4  # units; see `closest` in the fuzzer's table for how much of this is used


class Tolerance:
    """Slacks [like the field] of one problem's results."""

    def __init__(self, truth: Truth, dtype: torch.dtype, buffered: bool = False):
        """`dtype` is the input's; with `buffered`, scores are rounded to it before they become weights."""
        self.truth = t = truth
        self.narrow = torch.finfo(dtype).eps
        self.wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        self.terms = abs(t.scale) * torch.einsum("bhid,bhjd->bhij", t.q.abs(), t.k[:, t.kv_head].abs())
        self.seen = self.terms * t.visible
        largest = torch.cat([self.seen, self.seen.new_zeros(*self.seen.shape[:3], 1)], -1).amax(-1)
        sinks = 0.0 if t.sinks is None else t.sinks.abs().view(1, -1, 1)
        self.of_logits = 4 + 2 * largest + sinks + 2 * (t.softcap or 0.0)  # [B, Hq, M]
        self.relative = (self.wide * self.of_logits)[..., None]
        if buffered:
            self.relative = self.relative + self.narrow * largest[..., None]
        finest = torch.finfo(dtype).smallest_normal * self.narrow  # what fp16 cannot tell from 0
        operands = [x.abs().max() for x in (t.q, t.k, t.v) if x.numel()]
        self.floor = finest * (4 + (t.n_q + t.n_k) * max(operands, default=0.0))

    def of(self, field: str) -> Tensor:
        """Return the slack of a field of `Truth`."""
        t, weights = self.truth, self.truth.weights
        raw = self.wide * self.terms  # masked terms too: linear algorithms take differences of prefix sums
        raw = raw * (1 + max(t.n_q, t.n_k) ** 0.5 / 16)  # rows that are all alike (expanded) do not average roundings
        largest_term = self.seen.amax() if self.seen.numel() else 0.0
        match field:
            case "output":
                values = t.v[:, t.kv_head].abs()
                slack = (self.relative + self.narrow) * torch.einsum("bhij,bhjd->bhid", t.kept, values)
            case "lse":
                slack = self.relative[..., 0] + self.wide * t.lse().abs().masked_fill(t.blind, 0)
            case "scores":
                slack = self.wide * self.seen + self.narrow * t.scores().abs()
            case "row_sum":
                slack = raw.sum(-1)
            case "col_sum":
                slack = t.columns(raw) if t.region.q_begin == 0 else self._raw_columns(raw)
            case "weight_sum":
                slack = t.columns(weights * self.relative)
            case "entropy":
                slack = ((1 + weights.clamp(min=1e-45).log().abs()) * weights).sum(-1) * 2 * self.relative[..., 0]
            case "mean_distance":
                slack = 2 * self.relative[..., 0] * t.mean_distance()
            case "max_weight":
                slack = self.relative[..., 0] * t.max_weight()
            case "row_squares":
                slack = 2 * self.relative[..., 0] * t.row_squares()
            case "col_squares":
                slack = 2 * t.columns(weights**2 * self.relative)
            case "col_max_weight":
                slack = self.relative.amax() * t.col_max_weight() if weights.numel() else t.col_max_weight()
            case "row_largest_logit" | "col_largest_logit":
                slack = torch.full_like(getattr(t, field)(), self.wide * float(largest_term))
            case _:
                raise ValueError(field)
        return ROUNDINGS * slack + self.floor

    def _raw_columns(self, raw: Tensor) -> Tensor:
        """Return what the region's column sums lose: a prefix sum may have begun before the region."""
        sums = raw.sum(2)[..., : self.truth.region.k_stop]
        return sums if self.truth.region.per_query_head else self.truth.of_groups(sums, torch.sum)

    def of_gradients(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the slacks of the gradients of q, k, v and sinks, from the gradients of the results.

        They follow the backward pass (dS = P ∘ (dP - delta), dQ = s·dS·K, …) with absolute terms.
        """
        t = self.truth
        grads = {name: x.abs() for name, x in grads.items()}
        nothing = torch.zeros_like(t.weights)
        of_weights, of_values = nothing, torch.zeros_like(t.v)
        each = self.relative + self.narrow
        if "output" in grads:
            of_weights = torch.einsum("bhid,bhjd->bhij", grads["output"], t.v[:, t.kv_head].abs())
            if t.dropout_factor is not None:
                of_weights = of_weights * t.dropout_factor
            of_values = torch.einsum("bhij,bhid->bhjd", t.kept * each, grads["output"])
            of_values = t.of_groups(of_values, torch.sum)
        of_scores = nothing
        for name, x in grads.items():
            if name in ("weight_sum", "col_sum"):
                x = torch.nn.functional.pad(x, (0, t.n_k - x.shape[2]))
                x = (x if t.region.per_query_head else x[:, t.kv_head])[:, :, None]
                x = x * (t.counted if name == "weight_sum" else torch.ones_like(t.counted))
                of_weights, of_scores = (
                    (of_weights + x, of_scores) if name == "weight_sum" else (of_weights, of_scores + x)
                )
            elif name == "entropy":
                of_weights = of_weights + x[..., None] * (1 + t.weights.clamp(min=1e-45).log().abs())
            elif name in ("scores", "row_sum"):
                of_scores = of_scores + (x * t.visible if name == "scores" else x[..., None])
        delta = (t.weights * of_weights).sum(-1) + grads.get("lse", torch.zeros(()))
        of_logits = (t.weights * (of_weights + delta[..., None]) + of_scores) * each
        scale = abs(t.scale)
        slacks = {
            "q": scale * torch.einsum("bhij,bhjd->bhid", of_logits, t.k[:, t.kv_head].abs()),
            "k": scale * t.of_groups(torch.einsum("bhij,bhid->bhjd", of_logits, t.q.abs()), torch.sum),
            "v": of_values,
            "sinks": (t.sink_weight * delta * each[..., 0]).sum((0, 2)),
        }
        largest = max((x.max() for x in grads.values() if x.numel()), default=0.0)
        return {name: ROUNDINGS * x + self.floor * (1 + largest) for name, x in slacks.items()}
