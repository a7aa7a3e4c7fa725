"""The public statistics of rows, and reductions of the caller's own, on both backends; and what they refuse."""

import pytest
import torch
from helpers import Case, assert_right, make_qkv, references

from course.largest_tensor import LargestTensor
from flash_attention_with_scores import (
    AttentionReduction,
    AttentionStats,
    attention_with_reduction,
    attention_with_stats,
)

triton = pytest.importorskip("triton", reason="Triton has no wheels for this platform")
tl = triton.language

from stage3_scores_and_sums.hooks import largest_weight, squared_weights  # noqa: E402

CASE = Case(1, 4, 2, 21, 90, 16, True)
SMALL = Case(1, 2, 1, 17, 33, 16, True)
BACKENDS = ["pytorch", "triton"]
STATS = ("entropy", "max_weight", "mean_distance")
OPTIONS = {
    "full": {},
    "causal window": {"causal": True, "window": (40, None)},
    "padding": {"causal": True, "key_padding_mask": torch.arange(90)[None] % 5 > 1, "sm_scale": -0.3},
    "softcap and sinks": {"causal": True, "softcap": 3.0, "sinks": torch.tensor([0.0, 3.0, -torch.inf, 1.0])},
}

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@triton.jit
def add_logits(acc, logits, weights, q_idx, k_idx):
    return acc + tl.sum(tl.where(logits == float("-inf"), 0.0, logits), 1)


@triton.jit
def add_distances(acc, logits, weights, q_idx, k_idx):
    return acc + tl.sum(weights * (q_idx - k_idx), 1)


@triton.jit
def four_arguments(acc, logits, weights, q_idx):
    return acc


FOLDS = {  # the same on both backends
    "largest": {"triton": largest_weight, "pytorch": lambda acc, logits, p, i, j: torch.maximum(acc, p.amax(-1))},
    "squared": {"triton": squared_weights, "pytorch": lambda acc, logits, p, i, j: acc + (p * p).sum(-1)},
    "logits": {"triton": add_logits, "pytorch": lambda acc, s, p, i, j: acc + s.masked_fill(s.isneginf(), 0).sum(-1)},
    "distances": {"triton": add_distances, "pytorch": lambda acc, logits, p, i, j: acc + (p * (i - j)).sum(-1)},
}


def on(device, options):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@each_backend
@pytest.mark.parametrize("name", OPTIONS)
def test_stats_match_the_oracle(device, backend, name):
    q, k, v = make_qkv(CASE, device=device)
    options = on(device, OPTIONS[name])
    stats = attention_with_stats(q, k, v, **options, backend=backend)
    assert isinstance(stats, AttentionStats)
    oracle, naive = references(q, k, v, **options)
    for field, x in stats._asdict().items():
        assert_right(field, x, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize(("backend", "dtype"), [("pytorch", torch.float64), *((b, torch.bfloat16) for b in BACKENDS)])
def test_dtypes(device, backend, dtype):
    q, k, v = make_qkv(CASE, dtype, device)
    stats = attention_with_stats(q, k, v, True, backend=backend)
    oracle, naive = references(q, k, v, True)
    wide = torch.promote_types(dtype, torch.float32)
    for field, x in stats._asdict().items():
        assert_right(field, x, oracle, naive, dtype=dtype if field == "output" else wide)
    fold = FOLDS["largest"][backend]
    reduced = attention_with_reduction(q, k, v, True, row=fold, col=fold, per_query_head=True, backend=backend)
    assert_right("max_weight", reduced.row, oracle, naive, dtype=wide)
    expected = (x._replace(total_attention=x.weights.amax(2)) for x in (oracle, naive))
    assert_right("total_attention", reduced.col, *expected, dtype=wide)


@each_backend
@pytest.mark.parametrize("name", OPTIONS)
def test_reductions_match_the_oracle(device, backend, name):
    q, k, v = make_qkv(CASE, device=device)
    options = on(device, OPTIONS[name])
    results = references(q, k, v, **options)
    distances = torch.arange(21, device=device)[:, None] - torch.arange(90, device=device)

    def check(field, actual, of):
        assert_right(field, actual, *(x._replace(**{field: of(x)}) for x in results), dtype=torch.float32)

    def by_group(x):
        return x.unflatten(1, (2, 2)).sum((2, 3))

    reduced = attention_with_reduction(
        q, k, v, **options, row=FOLDS["distances"][backend], col=FOLDS["squared"][backend], backend=backend
    )
    assert isinstance(reduced, AttentionReduction)
    check("output", reduced.output, lambda x: x.output)
    check("row_sum", reduced.row, lambda x: (x.weights * distances).sum(-1))
    check("col_sum", reduced.col, lambda x: by_group(x.weights**2))
    fold = FOLDS["logits"][backend]
    reduced = attention_with_reduction(q, k, v, **options, row=fold, col=fold, backend=backend)
    check("row_sum", reduced.row, lambda x: x.row_sum)
    check("col_sum", reduced.col, lambda x: x.col_sum)


@each_backend
def test_one_fold_or_none_and_where_it_starts(device, backend):
    q, k, v = make_qkv(SMALL, device=device)
    output, row, col = attention_with_reduction(q, k, v, backend=backend)
    assert row is None
    assert col is None
    fold = FOLDS["largest"][backend]
    only_row = attention_with_reduction(q, k, v, row=fold, row_start=0.3, backend=backend)
    assert torch.equal(only_row.output, output)
    assert only_row.col is None
    oracle, _ = references(q, k, v)
    torch.testing.assert_close(only_row.row.double(), oracle.max_weight.clamp(min=0.3), rtol=1e-5, atol=1e-5)
    only_col = attention_with_reduction(q, k, v, col=fold, col_start=0.1, backend=backend)
    assert only_col.row is None
    largest = oracle.weights.amax((1, 2))[:, None].clamp(min=0.1)
    torch.testing.assert_close(only_col.col.double(), largest, rtol=1e-5, atol=1e-5)


@each_backend
def test_dropout_changes_the_output_only_and_the_same_bits_come_twice(device, backend):
    q, k, v = make_qkv(SMALL, device=device)
    fold = FOLDS["squared"][backend]
    for function, own in ((attention_with_stats, {}), (attention_with_reduction, {"row": fold, "col": fold})):
        output, *first = function(q, k, v, True, **own, backend=backend)
        dropped, *second = function(q, k, v, True, dropout_p=0.4, seed=3, **own, backend=backend)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
        assert not torch.allclose(output, dropped)


@each_backend
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0), (1, 2, 1, 0)], ids=str)
def test_empty_tensors(device, backend, shape):
    batch, heads, n_q, n_k = shape
    q, k = torch.randn(batch, heads, n_q, 16, device=device), torch.randn(batch, heads, n_k, 16, device=device)
    stats = attention_with_stats(q, k, k, backend=backend)
    assert stats.lse.isneginf().all()
    for x in (stats.output, stats.entropy, stats.max_weight, stats.mean_distance):
        assert x.shape[:3] == (batch, heads, n_q)
        assert not x.any()
    fold = FOLDS["largest"][backend]
    starts = {"row_start": 2.0, "col_start": 3.0}
    reduced = attention_with_reduction(q, k, k, row=fold, col=fold, **starts, backend=backend)
    assert torch.equal(reduced.row.cpu(), torch.full((batch, heads, n_q), 2.0))
    assert torch.equal(reduced.col.cpu(), torch.full((batch, heads, n_k), 3.0))


def test_cpu_backend_never_makes_the_matrix():
    q, k, v = make_qkv(Case(1, 2, 1, 2048, 2048, 16, True))
    fold = FOLDS["squared"]["pytorch"]
    for function, own in ((attention_with_stats, {}), (attention_with_reduction, {"row": fold, "col": fold})):
        with LargestTensor() as largest:
            function(q, k, v, True, window=700, **own)
        assert largest.bytes <= 4 * 2 * max(2 * 128 * 512, q.numel()), f"{largest.bytes} bytes were allocated"


def test_kernels_never_make_the_matrix(device):
    q, k, v = make_qkv(Case(1, 1, 1, 400, 400, 16, True), torch.float16, device)
    own = {"row": largest_weight, "col": largest_weight}
    for function, folds in ((attention_with_stats, {}), (attention_with_reduction, own)):
        with LargestTensor() as largest:
            function(q, k, v, True, window=(20, None), **folds, backend="triton")
        assert largest.bytes <= 4 * q.numel(), f"{largest.bytes} bytes were allocated"


def test_compiles_into_one_graph(device):
    q, k, v = make_qkv(SMALL, device=device)

    def block(q, k, v):
        stats = attention_with_stats(q * 2, k, v, causal=True, backend="triton")
        return stats.entropy + 1, stats.mean_distance

    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(q, k, v), block(q, k, v))


def good(**changes):
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    return {"q": q, "k": k, "v": v} | changes


def plain(acc, logits, weights, q_idx, k_idx):
    return acc


BAD_FOLDS = {
    "not jitted": ("triton", TypeError, "must be a @triton.jit function for backend='triton', got <function", plain),
    "not a function": ("triton", TypeError, "must be a @triton.jit function for backend='triton', got 3", 3),
    "four arguments": (
        "triton",
        TypeError,
        r"must take five arguments \(acc, logits, weights, q_idx, k_idx\), got 4: \['acc', .*'q_idx'\]",
        four_arguments,
    ),
    "jitted": ("pytorch", TypeError, "must be a plain function of tensors for backend='pytorch'", largest_weight),
    "a number": ("pytorch", TypeError, "must be a plain function of tensors for backend='pytorch', got 3", 3),
    "two arguments": ("pytorch", TypeError, "must take five arguments .*, got 2: ", lambda acc, weights: acc),
}


@pytest.mark.parametrize("argument", ["row", "col"])
@pytest.mark.parametrize("name", BAD_FOLDS)
def test_folds_that_cannot_be_used(device, argument, name):
    backend, error, message, fold = BAD_FOLDS[name]
    inputs = {key: x.to(device) for key, x in good().items()}
    with pytest.raises(error, match=f"{argument} {message}"):
        attention_with_reduction(**inputs, **{argument: fold}, backend=backend)


BAD = {
    "start is text": (TypeError, "row_start must be a number, got str", good(row_start="0")),
    "start is NaN": (ValueError, "col_start must be finite, got nan", good(col_start=float("nan"))),
    "flag is an int": (TypeError, "per_query_head must be a bool, got int", good(per_query_head=1)),
}
BAD_ANYWHERE = {
    "negative window": (ValueError, r"window must not be negative, got \(3, -2\)", good(window=(3, -2))),
    "another length": (ValueError, "v must have k's batch, heads and length", good(v=torch.randn(1, 2, 11, 16))),
    "dropout of 1": (ValueError, r"dropout_p must be in \[0, 1\), got 1", good(dropout_p=1)),
    "unknown option": (TypeError, "unexpected keyword argument 'splits'", good(splits=2)),
    "fp8": (
        TypeError,
        "q must be fp16, bf16, fp32 or fp64, got",
        good(q=torch.ones(1, 4, 8, 16).to(torch.float8_e5m2)),
    ),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_ANYWHERE])
def test_bad_input_is_refused_by_name(name):
    error, message, arguments = (BAD | BAD_ANYWHERE)[name]
    with pytest.raises(error, match=message):
        attention_with_reduction(**arguments)
    if name in BAD_ANYWHERE:
        with pytest.raises(error, match=message):
            attention_with_stats(**arguments)


@pytest.mark.gpu
def test_a_long_sequence():
    """Statistics of 65536 rows, checked on the last few, and the largest weights that keys get, in O(N) memory."""
    n = 65536
    q, k, v = make_qkv(Case(1, 4, 2, n, n, 64, True), torch.bfloat16, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stats = attention_with_stats(q, k, v, True)
    reduced = attention_with_reduction(q, k, v, True, row=largest_weight, col=largest_weight)
    assert torch.cuda.max_memory_allocated() - before <= 4 * q.nbytes
    oracle, naive = references(q[:, :, -64:], k, v, True)
    for field in ("output", "lse", *STATS):
        assert_right(field, getattr(stats, field)[:, :, -64:], oracle, naive)
    assert_right("max_weight", reduced.row[:, :, -64:], oracle, naive)
    assert reduced.col[..., 0].min() > 0.99  # the first query sees the first key alone
    assert reduced.col.max() <= 1.001


@pytest.mark.gpu
def test_stats_run_in_a_cuda_graph():
    q, k, v = make_qkv(Case(1, 8, 2, 500, 500, 64, True), torch.bfloat16, "cuda")
    attention_with_stats(q, k, v, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attention_with_stats(q, k, v, True)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(results, attention_with_stats(q, k, v, True), strict=True))
