"""Stage 3: reductions of the caller's own over rows and over columns."""

import math

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, flat, make_qkv, references
from test_stage2_features import FEATURES, options_of

from course.grader import compare

triton = pytest.importorskip("triton", reason="Triton has no wheels for this platform")
tl = triton.language

SELF = Case(2, 2, 1, 33, 70, 16, True)
HEADS = Case(1, 4, 2, 21, 90, 16, True)
EMPTY_ROWS = Case(1, 3, 1, 60, 33, 24, True)
MASKED = ["causal window", "right window", "softcap", "sinks", "padding", "negative scale"]

each_case = pytest.mark.parametrize("case", [SELF, EMPTY_ROWS], ids=["M < N", "M > N"])


@triton.jit
def add_logits(acc, logits, weights, q_idx, k_idx):
    """Sum the raw scores of those who see each other."""
    return acc + tl.sum(tl.where(logits == float("-inf"), 0.0, logits), 1)


@triton.jit
def add_positions(acc, logits, weights, q_idx, k_idx):
    """Sum the weights, each times a number that tells queries from keys."""
    return acc + tl.sum(weights * (3 * q_idx + k_idx), 1)


@triton.jit
def smallest_visible(acc, logits, weights, q_idx, k_idx):
    """Find the smallest logit; what is masked does not count."""
    return tl.minimum(acc, tl.min(tl.where(logits == float("-inf"), float("inf"), logits), 1))


@pytest.fixture
def hooks(graded):
    return graded("stage3_scores_and_sums", "hooks")


@pytest.fixture
def fold_rows(graded):
    return flat(graded("stage3_scores_and_sums", "launch").fold_rows)


@pytest.fixture
def fold_columns(graded):
    return flat(graded("stage3_scores_and_sums", "column_sums").fold_columns)


def second_pass(options):
    """Return the options of a second pass: sinks are in the lse."""
    return {name: x for name, x in options.items() if name != "sinks"}


def both(q, k, v, *args, **options):
    """Return the oracle, the naive formula, and the lse of the first pass."""
    oracle, naive = references(q, k, v, *args, **options)
    return oracle, naive, oracle.lse.float().contiguous()


def kept(result, name, values):
    """Return a result that holds `values` in a field, for `assert_right`."""
    return result._replace(**{name: values})


def positions(result):
    """Return 3·i + j of every query i and key j."""
    q_idx = torch.arange(result.weights.shape[2], device=result.weights.device)
    k_idx = torch.arange(result.weights.shape[3], device=result.weights.device)
    return 3 * q_idx[:, None] + k_idx


def per_group(x, n_kv_heads):
    return x.unflatten(1, (n_kv_heads, -1))


@each_case
@pytest.mark.parametrize("name", ["full", *MASKED])
def test_rows(fold_rows, hooks, device, case, name):
    q, k, v = make_qkv(case, device=device)
    options = options_of(FEATURES[name], case, device)
    oracle, naive, lse = both(q, k, v, **options)
    options = second_pass(options)
    largest = fold_rows(q, k, lse, hooks.largest_weight, 0.0, **options)
    assert_right("max_weight", largest, oracle, naive, dtype=torch.float32)
    if name in ("full", "causal window", "padding"):
        sums = fold_rows(q, k, lse, add_logits, 0.0, **options)
        assert_right("row_sum", sums, oracle, naive, dtype=torch.float32)
    else:
        expected = (kept(x, "row_sum", (x.weights * positions(x)).sum(-1)) for x in (oracle, naive))
        assert_right("row_sum", fold_rows(q, k, lse, add_positions, 0.0, **options), *expected)


@each_case
@pytest.mark.parametrize("name", ["full", *MASKED])
def test_columns(fold_columns, hooks, device, case, name):
    q, k, v = make_qkv(case, device=device)
    options = options_of(FEATURES[name], case, device)
    oracle, naive, lse = both(q, k, v, **options)
    options = second_pass(options)
    squared = (per_group(x.weights**2, case.n_kv_heads).sum((2, 3)) for x in (oracle, naive))
    actual = fold_columns(q, k, lse, hooks.squared_weights, 0.0, **options)
    result = compare(actual, *squared, eps_factor=16)  # a square has twice the relative error
    assert result.ok, f"sum of squares: error {result.max_error:.3g}, allowed {result.allowed:.3g}"
    if name in ("full", "causal window", "padding"):
        sums = fold_columns(q, k, lse, add_logits, 0.0, **options)
        assert_right("col_sum", sums, oracle, naive, dtype=torch.float32)
    else:
        weighted = (x.weights * positions(x) for x in (oracle, naive))
        expected = (
            kept(x, "col_sum", per_group(y, case.n_kv_heads).sum((2, 3)))
            for x, y in zip((oracle, naive), weighted, strict=True)
        )
        assert_right("col_sum", fold_columns(q, k, lse, add_positions, 0.0, **options), *expected)


@pytest.mark.parametrize("case", [HEADS, EMPTY_ROWS], ids=["M < N", "M > N"])
def test_columns_of_each_query_head(fold_columns, hooks, device, case):
    q, k, v = make_qkv(case, device=device)
    oracle, naive, lse = both(q, k, v, True)
    expected = (kept(x, "total_attention", x.weights.amax(2)) for x in (oracle, naive))
    largest = fold_columns(q, k, lse, hooks.largest_weight, 0.0, True, per_query_head=True)
    assert_right("total_attention", largest, *expected, dtype=torch.float32)
    of_group = fold_columns(q, k, lse, hooks.largest_weight, 0.0, True)
    assert torch.equal(of_group, per_group(largest, case.n_kv_heads).amax(2))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(fold_rows, fold_columns, hooks, device, dtype):
    q, k, v = make_qkv(SELF, dtype, device)
    oracle, naive, lse = both(q, k, v, True)
    largest = fold_rows(q, k, lse, hooks.largest_weight, 0.0, True)
    assert_right("max_weight", largest, oracle, naive, dtype=torch.float32)
    expected = (kept(x, "col_sum", per_group(x.weights**2, 1).sum((2, 3))) for x in (oracle, naive))
    squares = fold_columns(q, k, lse, hooks.squared_weights, 0.0, True)
    assert_right("col_sum", squares, *expected, dtype=torch.float32)


@pytest.mark.parametrize("case", [HEADS, CASES[0], *CASES[10:12]], ids=str)
def test_shapes(fold_rows, fold_columns, hooks, device, case):
    q, k, v = make_qkv(case, device=device)
    oracle, naive, lse = both(q, k, v, case.causal)
    assert_right("max_weight", fold_rows(q, k, lse, hooks.largest_weight, 0.0, case.causal), oracle, naive)
    sums = fold_columns(q, k, lse, add_logits, 0.0, case.causal)
    assert_right("col_sum", sums, oracle, naive)


def test_start(fold_rows, fold_columns, hooks, device):
    """What no tile touches, or no visible element beats, keeps the start: padded keys and empty rows among them."""
    case = Case(1, 2, 1, 50, 30, 16, True)
    q, k, v = make_qkv(case, device=device)
    real = torch.arange(30, device=device)[None] % 4 > 0
    masks = {"causal": True, "key_padding_mask": real}
    oracle, _, lse = both(q, k, v, **masks)
    scores = oracle.scores.masked_fill(oracle.weights == 0, math.inf).float()
    rows = fold_rows(q, k, lse, smallest_visible, 0.5, **masks)
    torch.testing.assert_close(rows, scores.amin(-1).clamp(max=0.5))
    assert (rows[:, :, :20] == 0.5).all()
    columns = fold_columns(q, k, lse, smallest_visible, 0.5, **masks)
    torch.testing.assert_close(columns, scores.amin((1, 2))[:, None].clamp(max=0.5))
    assert (columns[:, :, ~real[0]] == 0.5).all()
    padded = fold_columns(q, k, lse, hooks.largest_weight, -7.0, **masks)
    assert torch.equal(padded == -7.0, ~real[:, None])


def test_same_bits_twice(fold_rows, fold_columns, hooks, device):
    q, k, v = make_qkv(SELF, device=device)
    _, _, lse = both(q, k, v, True)
    for fold in (fold_rows, fold_columns):
        results = [fold(q, k, lse, hooks.squared_weights, 0.0, True) for _ in range(2)]
        assert torch.equal(*results)
