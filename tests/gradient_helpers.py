"""What the tests of stage 4 share: problems whose gradients the definition gives, and how they are compared."""

import math
from typing import NamedTuple

import pytest
import torch
from helpers import Case, make_qkv
from torch import Tensor

from course.grader import compare
from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.philox import keep_mask
from stage1_pytorch_tiled.setting import Setting
from stage4_backward.gradients import Gradients

WHOLE = (0, None, None)  # q_begin, q_stop, k_stop of column sums
INPUTS = ("q", "k", "v", "sinks")


class Loss(NamedTuple):
    """What a loss hangs on: fields of `Gradients`, or "total_attention", the softmax column sums of query heads."""

    through: tuple[str, ...]
    region: tuple[int, int | None, int | None] = WHOLE


OUTPUT = Loss(("output",))
LOSSES = {
    "lse": Loss(("lse",)),
    "output and lse": Loss(("output", "lse")),
    "scores": Loss(("scores",)),
    "output and scores": Loss(("output", "scores")),
    "softmax sums": Loss(("softmax_col_sum",)),
    "output and softmax sums": Loss(("output", "softmax_col_sum")),
    "some queries": Loss(("softmax_col_sum",), (5, 18, None)),
    "cross-token": Loss(("output", "softmax_col_sum"), (17, None, 17)),
    "query heads": Loss(("total_attention",)),
    "entropy": Loss(("entropy",)),
    "output and entropy": Loss(("output", "entropy")),
    "everything": Loss(("output", "lse", "scores", "total_attention", "entropy")),
}
SHAPES = {
    "self": Case(1, 4, 2, 70, 70, 24, True),
    "M < N": Case(2, 2, 1, 21, 150, 16, True),  # whole tiles of keys, and less than a tile of queries
    "M > N": Case(1, 2, 1, 150, 33, 16, True),
}


class Problem(NamedTuple):
    """A backward pass to be computed, and its result by the definition."""

    inputs: tuple[Tensor, ...]  # q, k, v, output, lse
    grads: dict  # of the results, by the fields of `Gradients`
    options: dict  # of attention
    oracle: dict[str, Tensor | None]  # gradients by the names of INPUTS, in float64
    naive: dict[str, Tensor | None]  # the same from the naive formula in the inputs' own dtype
    floor: dict[str, float]  # errors that are allowed for what fp32 rounds away within a gradient, by the input

    def check(self, name: str, actual: Tensor) -> None:
        """Compare the gradient of an input by the course's tolerance."""
        expected = self.oracle[name]
        dtype = self.options["sinks"].dtype if name == "sinks" else self.inputs[0].dtype
        assert actual.shape == expected.shape, f"gradient of {name} has shape {list(actual.shape)}"
        assert actual.dtype == dtype, f"gradient of {name} has dtype {actual.dtype}, expected {dtype}"
        result = compare(actual, expected, self.naive[name])
        allowed = result.allowed + self.floor.get(name, 0.0)
        assert result.max_error <= allowed, f"gradient of {name}: error {result.max_error:.3g}, allowed {allowed:.3g}"


def make_problem(
    case, dtype=torch.float32, device="cpu", loss=OUTPUT, *, qkv=None, magnitude=1.0, **options
) -> Problem:
    """Draw inputs and the gradients of a loss; options are those of attention, with causal, dropout_p and seed."""
    qkv = make_qkv(case, dtype, device, magnitude) if qkv is None else qkv
    sinks = () if options.get("sinks") is None else (options["sinks"],)
    q_begin, q_stop, _ = loss.region
    wide = [x.detach().double().requires_grad_() for x in (*qkv, *sinks)]
    results = _results(wide, loss.region, options)
    grads = {}
    for name in loss.through:
        narrow = qkv[0].dtype if name in ("output", "scores") else torch.promote_types(qkv[0].dtype, torch.float32)
        grads[name] = torch.randn(results[name].shape, dtype=torch.float64).to(device, narrow)
    oracle = _gradients(results, wide, grads)
    own = [x.detach().requires_grad_() for x in (*qkv, *sinks)]
    naive = _gradients(_results(own, loss.region, options), own, grads)
    output = results["output"].detach().to(qkv[0].dtype)
    lse = results["lse"].detach().to(torch.promote_types(qkv[0].dtype, torch.float32))
    fields = {"softmax_col_sum" if name == "total_attention" else name: x for name, x in grads.items()}
    if loss.region != WHOLE:
        fields |= {"q_begin": q_begin, "q_stop": q_stop}
    floor = _rounded_away(qkv, grads, results["scores"], options)
    return Problem((*(x.detach() for x in qkv), output, lse), fields, options, oracle, naive, floor)


def _results(inputs, region, options) -> dict[str, Tensor]:
    """Return what a loss may hang on, from the definition."""
    q, k, v, *sinks = inputs
    options = dict(options)
    q_begin, q_stop, k_stop = region
    if sinks:
        options["sinks"] = sinks[0]
    seed = options.pop("seed", 0)
    if options.get("dropout_p"):
        options["dropout_mask"] = kept_weights(q, k, options["dropout_p"], seed)
    result = naive_attention(q, k, v, **options)
    scores, weights = (x[:, :, q_begin:q_stop, :k_stop].sum(-2, dtype=result.lse.dtype) for x in result[2:4])
    of_group = [x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (scores, weights)]
    names = ("output", "lse", "scores", "row_sum", "col_sum", "softmax_col_sum", "total_attention", "entropy")
    return dict(zip(names, (*result[:3], result.row_sum, *of_group, weights, result.entropy), strict=True))


def kept_weights(q, k, dropout_p, seed) -> Tensor:
    """Return the weights that dropout keeps, bool [B, Hq, M, N]."""
    heads = torch.arange(q.shape[0] * q.shape[1]).view(*q.shape[:2], 1, 1)
    kept = keep_mask(seed, heads, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]), dropout_p)
    return kept.to(q.device)


def _gradients(results, inputs, grads) -> dict[str, Tensor | None]:
    """Return the gradients of the inputs from those of the results; 0 where nothing depends on an input."""
    outputs = [results[name] for name in grads]
    found = torch.autograd.grad(
        outputs, inputs, [g.to(x.dtype) for g, x in zip(grads.values(), outputs, strict=True)], allow_unused=True
    )
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
    return dict(zip(INPUTS, found, strict=False))


def _rounded_away(qkv, grads, scores, options) -> dict[str, float]:
    """Return the errors that no fp32 recomputation avoids, four units of rounding of its largest intermediate results.

    q and k: dP - delta may cancel, wholly where a row sees one key; its terms are up to |dO|·|v|, times s·|k| or s·|q|.
    With an entropy dP has terms of -ln P, whose average is at most ln N, and which are off by the rounding of S.
    v: a weight e^{S - lse} is off by the rounding of S, relative to itself, times dO.
    """
    q, k, v = (x.detach().double() for x in qkv)
    if not {"output", "entropy"} & {*grads} or not scores.numel():
        return {}
    scale = options.get("sm_scale")
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    unit = 4 * torch.finfo(torch.promote_types(qkv[0].dtype, torch.float32)).eps
    largest_score = scores.detach().abs().max().item()
    cancelling = of_weights = 0.0
    if "output" in grads:
        grad_output = grads["output"].double() / (1 - options.get("dropout_p", 0.0))
        cancelling = unit * scale * (grad_output.norm(dim=-1).max() * v.norm(dim=-1).max()).item()
        of_weights = unit * largest_score * grad_output.abs().max().item()
    if "entropy" in grads:
        cancelling += unit * scale * (math.log(k.shape[2]) + largest_score) * grads["entropy"].abs().max().item()
    return {"q": cancelling * k.abs().max().item(), "k": cancelling * q.abs().max().item(), "v": of_weights}


class Kernel:
    """One of the two gradient kernels, alone in the backward pass: the other is not launched.

    `kernel(problem)` returns the kernel's gradients by the names of the inputs.
    """

    def __init__(self, name: str, launch, monkeypatch):
        pytest.importorskip("triton", reason="Triton has no wheels for this platform")
        self.gradients, other = {"grad_q": ("q", "grad_kv_kernel"), "grad_kv": ("kv", "grad_q_kernel")}[name]
        self.launch = launch
        monkeypatch.setattr(launch, other, Skipped())

    def __call__(self, problem: Problem) -> dict[str, Tensor]:
        found = self.launch.backward(*problem.inputs, Gradients(**problem.grads), Setting(**problem.options))
        return {name: found["qkv".index(name)] for name in self.gradients}

    def check(self, problem: Problem) -> None:
        """Compare the kernel's gradients by the course's tolerance; those of values first, which need less."""
        for name, grad in sorted(self(problem).items(), reverse=True):
            problem.check(name, grad)


class Skipped:
    """Stands in for a kernel that another file tests: `kernel[grid](...)` keeps its arguments and does nothing."""

    def __init__(self):
        self.arguments = ()

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.arguments = args

        return launch
