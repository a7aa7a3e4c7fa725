"""One case of the fuzzer, drawn from the run's seed and the case's own number alone, so that it can be had again.

What is drawn: batches of 0 to 2, 1 to 3 KV heads with 1 to 3 query heads each, 0 to 20 queries and keys with some at
the edges of tiles (63 to 70, 127 to 131, 511 to 513), D and Dv from 1 to 64, all floating dtypes of a backend, logits
up to about a hundred. Left out on purpose: autocast, logits beyond a thousand, inputs that are NaN, infinite or so
large that differences of prefix sums cancel or fp16 overflows, scales that underflow, sinks of -inf, and fp8.
"""

from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from benchmark.fuzz_layouts import guarded, lay_out
from benchmark.fuzz_operators import OPERATORS, Sizes

_BAD_OPTIONS = {  # what every operator that takes such an option must refuse, naming it
    "dropout_p": (1.0, -0.1, "0.1", float("nan")),
    "seed": (-1, 2**63, 0.5),
    "window": (-1, 2.0, (1, -2), (1, 2, 3)),
    "softcap": (0.0, -1.0, float("inf")),
    "sinks": ("wrong shape", 1.0),
    "key_padding_mask": ("wrong shape", "floats"),
}
_BAD_ANYWHERE = {"causal": (1, None), "sm_scale": (float("nan"), "1"), "backend": ("cuda", 1)}


class Case(NamedTuple):
    """One call: all but its tensors."""

    seed: int
    number: int
    operator: str
    backend: str
    device: str
    dtype: torch.dtype
    sizes: Sizes
    keywords: dict  # causal, sm_scale, backend, and options that are not tensors
    tensor_options: tuple[str, ...]  # of sinks and key_padding_mask, those given
    own: dict  # the operator's own arguments
    gradients_of: tuple[str, ...]  # inputs that require gradients
    refused: tuple[str, object] | None  # an argument, and what it must not be


def draw_case(seed: int, number: int, device: str = "cpu", triton_share: float | None = None) -> Case:
    """Draw a case.

    Args:
        seed, number: what it is drawn from.
        device: "cpu", or "cuda", where the PyTorch backend runs on either.
        triton_share: how many of the cases run the kernels; None for few on a CPU, whose interpreter is slow.
    """
    rng = Random(f"{seed}/{number}")
    operator = rng.choice(list(OPERATORS))
    share = (0.5 if device == "cuda" else 0.03) if triton_share is None else triton_share
    backend = "triton" if rng.random() < share else "pytorch"
    if operator.endswith("Func"):
        operator = f"FlashAttention{'Triton' if backend == 'triton' else 'PyTorch'}Func"
    if device == "cuda" and backend == "pytorch" and rng.random() < 0.5:
        device = "cpu"
    kind = OPERATORS[operator]
    half = (torch.float16, torch.bfloat16)
    dtype = rng.choice((torch.float32, torch.float32, *half, *((torch.float64,) * 2 if backend == "pytorch" else ())))
    sizes = _draw_sizes(rng, small=backend == "triton" and device == "cpu")
    keywords = {
        "causal": rng.random() < 0.5,
        "sm_scale": rng.choice((None, None, 0.3, 0.05, -0.5, 1, 0.0)),
        "backend": backend,
    }
    drawn = {
        "dropout_p": rng.choice((0.1, 0.5, 0.9)),
        "window": _draw_window(rng, sizes.n_k),
        "softcap": rng.choice((0.7, 3, 30.0)),
    }
    keywords |= {name: x for name, x in drawn.items() if name in kind.options and rng.random() < 0.4}
    if "dropout_p" in keywords:
        keywords["seed"] = rng.choice((0, rng.randrange(2**32), rng.randrange(2**63)))
    tensor_options = [x for x in ("sinks", "key_padding_mask") if x in kind.options and rng.random() < 0.4]
    own = kind.draw(rng, sizes)
    wanted = ()
    if rng.random() < 0.5 and not own.get("given") and not own.get("reuse_buffers"):
        inputs = ("q", "k", "v")[: 3 if kind.has_values else 2] + (("sinks",) if "sinks" in tensor_options else ())
        wanted = inputs if rng.random() < 0.7 else tuple(rng.sample(inputs, rng.randint(1, len(inputs))))
    refused = _draw_refused(rng, kind) if rng.random() < 0.05 and not operator.endswith("Func") else None
    return Case(
        seed, number, operator, backend, device, dtype, sizes, keywords, tuple(tensor_options), own, wanted, refused
    )  # fmt: skip


def _draw_sizes(rng: Random, small: bool) -> Sizes:
    def length(edges):
        return rng.choices((0, 1, rng.randint(2, 20), rng.choice(edges)), (2, 8, 80, 6 if small else 10))[0]

    edges = (31, 33, 65) if small else (63, 64, 65, 70, 127, 128, 129, 131, 511, 512, 513)
    most = 2 if small else 3
    batch = rng.choices((0, 1, 2), (1, 60, 30))[0]
    heads = rng.randint(1, most), rng.randint(1, most)
    n_q, n_k = length(edges[:-3] if not small else edges), length(edges)
    head_dim = rng.choice((*range(1, 10), 16, 16, 17, 24, 33, 64))
    return Sizes(batch, *heads, n_q, n_k, head_dim, head_dim if rng.random() < 0.5 else rng.choice((1, 3, 8, 16, 20)))


def _draw_window(rng: Random, n_k: int):
    side = [rng.choice((None, 0, rng.randint(0, 8), rng.randint(0, n_k + 2))) for _ in range(2)]
    return rng.randint(0, 8) if rng.random() < 0.3 else tuple(side)


def _draw_refused(rng: Random, kind) -> tuple[str, object]:
    bad = _BAD_ANYWHERE | {name: values for name, values in _BAD_OPTIONS.items() if name in kind.options} | kind.bad
    name = rng.choice(list(bad))
    return name, rng.choice(bad[name])


def make_tensors(case: Case) -> dict[str, Tensor]:
    """Return the tensors of a case by the names of arguments, in random layouts; those in `gradients_of` are leaves."""
    rng, normal = (
        Random(f"{case.seed}/{case.number}/layouts"),
        torch.Generator().manual_seed(hash((case.seed, case.number))),
    )
    s = case.sizes
    wide = torch.promote_types(case.dtype, torch.float32)

    def draw(*shape, dtype=case.dtype, scale=1.0):
        return lay_out((torch.randn(shape, generator=normal) * scale).to(case.device, dtype), rng)

    heads = s.n_kv_heads * s.group
    tensors = {
        "q": draw(s.batch, heads, s.n_q, s.head_dim, scale=rng.choice((1, 1, 0.1, 4))),
        "k": draw(s.batch, s.n_kv_heads, s.n_k, s.head_dim),
        "v": draw(s.batch, s.n_kv_heads, s.n_k, s.head_dim_v),
    }
    if "sinks" in case.tensor_options:
        tensors["sinks"] = draw(heads, dtype=rng.choice((case.dtype, torch.float32, torch.float64)), scale=2)
    if "key_padding_mask" in case.tensor_options:
        real = torch.rand(s.batch, s.n_k, generator=normal) < rng.choice((0.3, 0.8))
        tensors["key_padding_mask"] = lay_out(real.to(case.device), rng)
    if case.own.get("n_before") is not None:
        tensors["cumulative_scores"] = draw(s.batch, s.n_kv_heads, case.own["n_before"], dtype=wide)
    for name in case.own.get("given", ()):
        shape = (s.batch, heads, s.n_q, s.head_dim_v) if name == "out" else (s.batch, s.n_kv_heads, case.own["split"])
        tensors[name] = guarded(shape, case.dtype if name == "out" else wide, tensors["q"].device, rng)
    for name in case.gradients_of:
        tensors[name] = tensors[name].detach().requires_grad_()
    return tensors


def draw_gradients(case: Case, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return incoming gradients, in random layouts, of some of the results that have gradients."""
    rng, normal = Random(f"{case.seed}/{case.number}/grads"), torch.Generator().manual_seed(case.number)
    fields = [name for name in results if name not in OPERATORS[case.operator].no_gradient]
    fields = fields if rng.random() < 0.5 else rng.sample(fields, rng.randint(1, len(fields)))
    return {
        name: lay_out(torch.randn(x.shape, generator=normal).to(x.device, x.dtype), rng)
        for name, x in results.items()
        if name in fields
    }
