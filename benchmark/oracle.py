"""Decides whether what is timed is right, at lengths whose whole matrix would not fit: against float64, in parts."""

from itertools import pairwise

import torch
from torch import Tensor

from course.grader import compare
from stage1_pytorch_tiled.dense import naive_attention

ROWS = 256  # queries whose scores and outputs are compared; every sum is compared whole
_BLOCK = 1024  # queries whose matrix is in memory at a time


def output_is_right(output: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, rows: int = 64) -> bool:
    """Compare the last rows of an output, of the first head and the last."""
    group = q.shape[1] // k.shape[1]
    for head in {0, q.shape[1] - 1}:
        parts = (q[:1, head : head + 1, -rows:], k[:1, head // group, None], v[:1, head // group, None])
        oracle = naive_attention(*(x.double() for x in parts), causal=causal).output
        naive = naive_attention(*parts, causal=causal).output
        if not compare(output[:1, head : head + 1, -rows:], oracle, naive).ok:
            return False
    return True


class GradientOracle:
    """The gradients of the first head group, for as many rows as fit: whole up to N = 4096, the last rows beyond.

    Under a causal mask the last keys are seen by the last queries alone, so that their gradients need no other rows.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grad_output: Tensor, causal: bool):
        self.group = q.shape[1] // k.shape[1]
        self.rows = q.shape[2] if q.shape[2] <= 4096 else 64
        parts = [q[:1, : self.group, -self.rows :], k[:1, :1], v[:1, :1]]
        grad_output = grad_output[:1, : self.group, -self.rows :]
        self.references = []
        for dtype in (torch.float64, q.dtype):
            leaves = [x.detach().to(dtype).requires_grad_() for x in parts]
            output = naive_attention(*leaves, causal=causal).output
            grads = torch.autograd.grad(output, leaves, grad_output.to(dtype))
            self.references.append([x[:, :, -self.rows :].cpu() for x in (output.detach(), *grads)])
        self.whole = causal or self.rows == q.shape[2]
        self.eps_factor = 8 * max(1.0, (k.shape[2] / 1024) ** 0.5)  # rounding of a sum grows with the root of its terms

    def agrees(self, output: Tensor, grads: tuple[Tensor, ...]) -> bool:
        """Compare an output and the gradients of q, k and v; those of k and v only where the rows suffice."""
        actual = [output[:1, : self.group], grads[0][:1, : self.group], grads[1][:1, :1], grads[2][:1, :1]]
        compared = zip(actual, *self.references, strict=True)
        compared = list(compared)[: 4 if self.whole else 2]
        return all(compare(x[:, :, -self.rows :], *references, self.eps_factor).ok for x, *references in compared)


class StatisticsOracle:
    """Every field of NaiveAttention of two head groups, the first and the last, added up block by block of queries.

    Scores and outputs are kept for the last rows only; sums, the lse and the like are whole.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, split: int):
        self.group, n_kv_heads = q.shape[1] // k.shape[1], k.shape[1]
        self.n_kv_heads, self.expected = n_kv_heads, {}
        for head in sorted({0, n_kv_heads - 1}):
            parts = q[:1, head * self.group : (head + 1) * self.group], k[:1, head, None], v[:1, head, None]
            wide = _statistics(*(x.double() for x in parts), split)
            self.expected[head] = wide, _statistics(*parts, split)

    def agrees(self, field: str, actual: Tensor) -> bool:
        """Compare a field [B, Hq or Hk, …]."""
        for head, references in self.expected.items():
            of_keys = actual.shape[1] == self.n_kv_heads
            heads = slice(head, head + 1) if of_keys else slice(head * self.group, (head + 1) * self.group)
            part = actual[:1, heads]
            part = part[:, :, -ROWS:] if field in ("output", "scores") else part
            if not compare(part, *(reference[field] for reference in references)).ok:
                return False
        return True


def _statistics(q: Tensor, k: Tensor, v: Tensor, split: int) -> dict[str, Tensor]:
    """Return the fields of causal attention, with N rows and N keys, from one block of queries after another."""
    n = q.shape[2]
    by_key = {"col_sum": n, "softmax_col_sum": n, "total_attention": n}
    by_key |= {"cross_token_qk_sum": split, "cross_token_softmax_sum": split}
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = {"total_attention": q.shape[1]}
    fields = {name: q.new_zeros(1, heads.get(name, 1), size, dtype=wide) for name, size in by_key.items()}
    by_row = {name: [] for name in ("lse", "row_sum", "mean_distance")}
    cuts = sorted({*range(0, n, _BLOCK), split, n})
    for start, stop in pairwise(cuts):  # queries start to stop, which see the keys before stop
        block = naive_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], True)
        for name in by_row:
            by_row[name].append(getattr(block, name))
        for name in ("col_sum", "softmax_col_sum", "total_attention"):
            fields[name][..., :stop] += getattr(block, name)
        if start >= split:
            fields["cross_token_qk_sum"] += block.col_sum[..., :split]
            fields["cross_token_softmax_sum"] += block.softmax_col_sum[..., :split]
    last = naive_attention(q[:, :, -ROWS:], k, v, True)
    fields |= {"output": last.output, "scores": last.scores}
    return fields | {name: torch.cat(parts, -1) for name, parts in by_row.items()}
