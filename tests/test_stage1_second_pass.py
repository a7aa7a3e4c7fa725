"""Stage 1: the second pass over a part of the matrix, statistics of its rows, and reductions of the caller's own."""

import math

import pytest
import torch
from helpers import CASES, Case, assert_right, flat, make_qkv, references
from hypothesis import example, given, settings
from hypothesis import strategies as st

from course.largest_tensor import LargestTensor

SELF = Case(2, 4, 2, 50, 50, 16, True)
CACHE = Case(2, 4, 2, 33, 50, 16, True)
EMPTY_ROWS = Case(2, 4, 2, 50, 33, 16, True)  # the first 17 queries see nothing
OPTIONS = {
    "plain": {},
    "window": {"window": 6},
    "one-sided window": {"window": (None, 3)},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.0, 5.0, -math.inf, 2.0])},
    "padding": {"key_padding_mask": (torch.arange(50) % 5 > 1) & torch.tensor([[True], [False]])},
}
STATS = ("entropy", "max_weight", "mean_distance")

each_case = pytest.mark.parametrize("case", [SELF, CACHE, EMPTY_ROWS], ids=str)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def tiled_forward(graded):
    return flat(graded("stage1_pytorch_tiled", "tiled_forward"))


@pytest.fixture
def second_pass(graded):
    return flat(graded("stage1_pytorch_tiled", "second_pass"))


def fit(options, n_k):
    """Cut the padding mask, if any, to the number of keys."""
    return {name: x[:, :n_k] if name == "key_padding_mask" else x for name, x in options.items()}


def after_forward(tiled_forward, function, q, k, v, *args, causal=True, options=None, **kwargs):
    """Call a function of the second pass with the lse of the first, and the same masks."""
    options = dict(options or {})
    _, lse = tiled_forward.tiled_attention(q, k, v, causal, **options)
    options.pop("sinks", None)  # the sink is in the lse
    return function(q, k, lse, *args, causal=causal, **options, **kwargs)


def rows_of(result, q_begin, q_stop, k_stop):
    """Return the oracle's result with its column sums taken over a part of the matrix."""
    per_query_head = result.weights[:, :, q_begin:q_stop, :k_stop].sum(-2)
    return result._replace(total_attention=per_query_head)


@each_option
@pytest.mark.parametrize("split", [0, 1, 16, 21, 33])
@each_case
def test_cross_token_sum(tiled_forward, case, split, options):
    q, k, v = make_qkv(case)
    options = fit(options, case.n_k)
    oracle, naive = references(q, k, v, True, split=split, **options)
    function, region = tiled_forward.tiled_softmax_col_sum, {"q_begin": split, "k_stop": split}
    actual = after_forward(tiled_forward, function, q, k, v, options=options, **region)
    assert_right("cross_token_softmax_sum", actual, oracle, naive, dtype=torch.float32)


@each_option
@each_case
def test_sum_per_query_head(tiled_forward, case, options):
    q, k, v = make_qkv(case)
    options = fit(options, case.n_k)
    oracle, naive = references(q, k, v, True, **options)
    function = tiled_forward.tiled_softmax_col_sum
    actual = after_forward(tiled_forward, function, q, k, v, options=options, per_query_head=True)
    assert_right("total_attention", actual, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize(
    "region", [(0, 20, 50), (16, 32, 16), (5, 6, 49), (7, 33, 17), (9, 9, 9), (33, 33, 50)], ids=str
)
def test_sum_of_a_region(tiled_forward, region):
    q, k, v = make_qkv(CACHE)
    expected = (rows_of(result, *region) for result in references(q, k, v, True))
    named = dict(zip(("q_begin", "q_stop", "k_stop"), region, strict=True))
    function = tiled_forward.tiled_softmax_col_sum
    per_query_head = after_forward(tiled_forward, function, q, k, v, per_query_head=True, **named)
    assert_right("total_attention", per_query_head, *expected)
    per_kv_head = after_forward(tiled_forward, function, q, k, v, **named)
    torch.testing.assert_close(per_kv_head, per_query_head.unflatten(1, (2, 2)).sum(2))


def test_three_dimensional_sum_of_a_region(tiled_forward):
    q, k, v = torch.randn(2, 20, 16), torch.randn(2, 30, 16), torch.randn(2, 30, 16)
    oracle, naive = references(q, k, v, True, split=11)
    function, region = tiled_forward.tiled_softmax_col_sum, {"q_begin": 11, "k_stop": 11}
    for per_query_head in (False, True):
        actual = after_forward(tiled_forward, function, q, k, v, per_query_head=per_query_head, **region)
        assert_right("cross_token_softmax_sum", actual, oracle, naive)


@pytest.mark.parametrize("causal", [False, True])
def test_weight_tiles_stay_in_the_region(tiled_forward, causal):
    q, k, v = make_qkv(Case(1, 2, 1, 70, 70, 16, causal), torch.float64)
    _, lse = tiled_forward.tiled_attention(q, k, v, causal)
    grid = tiled_forward.TileGrid(q, k, causal)
    visits = []
    for tile, weights in tiled_forward.weight_tiles(grid, lse, 21, 60, 41):
        assert weights.shape[-2:] == (tile.q_rows.stop - tile.q_rows.start, tile.k_cols.stop - tile.k_cols.start)
        visits.append((tile.q_rows.start, tile.q_rows.stop, tile.k_cols.start, tile.k_cols.stop))
    rows, cols = [(21, 37), (37, 53), (53, 60)], [(0, 16), (16, 32), (32, 41)]
    assert visits == [(*m, *n) for m in rows for n in cols]


def test_weight_tiles_make_up_the_weights(tiled_forward):
    q, k, v = make_qkv(EMPTY_ROWS, torch.float64)
    _, lse = tiled_forward.tiled_attention(q, k, v, True)
    weights = torch.zeros(2, 2, 2, 50, 33, dtype=torch.float64)
    for tile, tile_weights in tiled_forward.weight_tiles(tiled_forward.TileGrid(q, k, True), lse):
        weights[..., tile.q_rows, tile.k_cols] = tile_weights
    oracle, _ = references(q, k, v, True)
    torch.testing.assert_close(weights.flatten(1, 2), oracle.weights)


def check_stats(tiled_forward, second_pass, q, k, v, causal=True, options=None, **tiles):
    stats = after_forward(tiled_forward, second_pass.tiled_row_stats, q, k, v, causal=causal, options=options, **tiles)
    oracle, naive = references(q, k, v, causal, **(options or {}))
    promised = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name in STATS:
        assert_right(name, getattr(stats, name), oracle, naive, dtype=promised)
    return stats


@pytest.mark.parametrize("case", CASES, ids=str)
def test_row_stats_match_oracle(tiled_forward, second_pass, case):
    check_stats(tiled_forward, second_pass, *make_qkv(case), case.causal)


@each_option
@each_case
def test_row_stats_with_masks(tiled_forward, second_pass, case, options):
    check_stats(tiled_forward, second_pass, *make_qkv(case), options=fit(options, case.n_k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_case
def test_row_stats_in_every_dtype(tiled_forward, second_pass, case, dtype):
    check_stats(tiled_forward, second_pass, *make_qkv(case, dtype))


@pytest.mark.parametrize("tiles", [(1, 1), (7, 5), (64, 16), (512, 512)], ids=str)
def test_row_stats_in_any_tiles(tiled_forward, second_pass, tiles):
    check_stats(tiled_forward, second_pass, *make_qkv(CACHE), block_m=tiles[0], block_n=tiles[1])


@pytest.mark.parametrize("magnitude", [1e-4, 30.0, 300.0])
def test_row_stats_at_any_magnitude(tiled_forward, second_pass, magnitude):
    stats = check_stats(tiled_forward, second_pass, *make_qkv(SELF, scale=magnitude))
    assert (stats.entropy >= 0).all()
    assert (stats.max_weight > 0).all()


def test_entropy_is_never_negative(tiled_forward, second_pass):
    q, k, v = make_qkv(SELF, scale=300.0)
    _, lse = tiled_forward.tiled_attention(q, k, v, True)
    rounded_down = torch.nextafter(lse, torch.tensor(-math.inf))  # as another kernel's lse may be
    assert (second_pass.tiled_row_stats(q, k, rounded_down, True).entropy >= 0).all()


def test_row_stats_of_uniform_attention(tiled_forward, second_pass):
    q, k, v = make_qkv(EMPTY_ROWS, torch.float64, scale=0.0)
    stats = after_forward(tiled_forward, second_pass.tiled_row_stats, q, k, v)
    n_seen = (torch.arange(50) - 16).clamp(min=0).double()  # 0 for the rows that see nothing, then 1 to 33
    expected = n_seen.clamp(min=1).log(), torch.where(n_seen > 0, 1 / n_seen, 0), (n_seen - 1).clamp(min=0) / 2
    for actual, row in zip(stats, expected, strict=True):
        torch.testing.assert_close(actual, row.expand(2, 4, 50))


def test_row_stats_of_rows_that_see_nothing(tiled_forward, second_pass):
    options = {"sinks": torch.randn(4)}
    stats = after_forward(tiled_forward, second_pass.tiled_row_stats, *make_qkv(EMPTY_ROWS), options=options)
    for actual in stats:
        assert (actual[:, :, :17] == 0).all()
        assert torch.isfinite(actual).all()


def test_row_stats_keep_poison_in_its_head(tiled_forward, second_pass):
    q, k, v = make_qkv(SELF)
    clean = after_forward(tiled_forward, second_pass.tiled_row_stats, q, k, v)
    k[1, 0, 3, 5] = math.nan  # the key head of query heads 0 and 1
    stats = after_forward(tiled_forward, second_pass.tiled_row_stats, q, k, v)
    untouched = torch.ones(2, 4, dtype=torch.bool)
    untouched[1, :2] = False
    for actual, expected in zip(stats, clean, strict=True):
        torch.testing.assert_close(actual[untouched], expected[untouched])
        assert actual[1, :2, 3:].isnan().all()


def fold_max(acc, logits, weights, q_idx, k_idx):
    return torch.maximum(acc, weights.amax(-1))


def fold_squares(acc, logits, weights, q_idx, k_idx):
    return acc + weights.square().sum(-1)


def fold_raw(acc, logits, weights, q_idx, k_idx):
    return acc + logits.masked_fill(logits == -math.inf, 0).sum(-1)


def fold_positions(acc, logits, weights, q_idx, k_idx):
    return acc + (weights * (q_idx - 2 * k_idx)).sum(-1)


def positions(n_q, n_k):
    return torch.arange(n_q)[:, None] - 2 * torch.arange(n_k)


FOLDS = {  # what is folded, element by element, and how
    fold_max: (lambda result: result.weights, torch.amax),
    fold_squares: (lambda result: result.weights.square(), torch.sum),
    fold_raw: (lambda result: result.scores, torch.sum),
    fold_positions: (lambda result: result.weights * positions(*result.weights.shape[-2:]), torch.sum),
}
each_fold = pytest.mark.parametrize("fold", FOLDS, ids=lambda fold: fold.__name__)


def folded(fold, result):
    """Return the oracle's result with row_sum and col_sum replaced by what folding its rows and columns gives."""
    element, reduce = FOLDS[fold]
    matrix = element(result)  # [B, Hq, M, N]
    by_kv_head = matrix.unflatten(1, (2, -1)).flatten(2, 3)  # [B, Hk, G·M, N]
    return result._replace(row_sum=reduce(matrix, dim=-1), col_sum=reduce(by_kv_head, dim=-2))


@each_fold
@each_option
@each_case
def test_folds_match_dense(tiled_forward, second_pass, case, options, fold):
    q, k, v = make_qkv(case)
    options = fit(options, case.n_k)
    oracle, naive = (folded(fold, result) for result in references(q, k, v, True, **options))
    rows = after_forward(tiled_forward, second_pass.fold_rows, q, k, v, fold, 0.0, options=options)
    assert_right("row_sum", rows, oracle, naive, dtype=torch.float32)
    cols = after_forward(tiled_forward, second_pass.fold_cols, q, k, v, fold, 0.0, options=options)
    assert_right("col_sum", cols, oracle, naive, dtype=torch.float32)


@each_fold
@pytest.mark.parametrize("tiles", [(1, 1), (7, 5), (512, 512)], ids=str)
def test_folds_in_any_tiles(tiled_forward, second_pass, tiles, fold):
    q, k, v = make_qkv(CACHE, torch.float64)
    oracle, naive = (folded(fold, result) for result in references(q, k, v, True))
    tiles = dict(zip(("block_m", "block_n"), tiles, strict=True))
    rows = after_forward(tiled_forward, second_pass.fold_rows, q, k, v, fold, 0.0, **tiles)
    assert_right("row_sum", rows, oracle, naive, dtype=torch.float64)
    cols = after_forward(tiled_forward, second_pass.fold_cols, q, k, v, fold, 0.0, **tiles)
    assert_right("col_sum", cols, oracle, naive, dtype=torch.float64)


def test_folds_begin_at_start(tiled_forward, second_pass):
    q, k, v = make_qkv(EMPTY_ROWS, torch.float64)
    for function in (second_pass.fold_rows, second_pass.fold_cols):
        from_zero, from_three = (
            after_forward(tiled_forward, function, q, k, v, fold_squares, start, options={"window": 2})
            for start in (0.0, 3.0)
        )
        torch.testing.assert_close(from_three, from_zero + 3)
    rows = after_forward(tiled_forward, second_pass.fold_rows, q, k, v, fold_max, -1.0)
    assert (rows[:, :, :16] == -1).all()  # the first block of queries sees no tile at all


@pytest.mark.parametrize("function", ["fold_rows", "fold_cols"])
def test_what_a_fold_is_given(tiled_forward, second_pass, function):
    def look(acc, logits, weights, q_idx, k_idx):
        n_reduced = logits.shape[-1]
        assert logits.shape == weights.shape == (*acc.shape, n_reduced)
        assert {acc.dtype, logits.dtype, weights.dtype} == {torch.float32}
        kept, reduced = (q_idx, k_idx) if function == "fold_rows" else (k_idx, q_idx)
        assert kept.shape == (acc.shape[-1], 1)
        assert reduced.shape == (1, n_reduced)
        visible = k_idx <= q_idx + 50 - 33
        assert torch.equal(logits > -math.inf, visible.expand_as(logits))
        assert torch.equal(weights > 0, visible.expand_as(weights))
        calls.append(1)
        return acc

    calls = []
    after_forward(tiled_forward, getattr(second_pass, function), *make_qkv(CACHE, torch.float16), look, 0.0)
    n_tiles = 3 + 4 + 4  # of 12, those below the diagonal
    assert len(calls) == (n_tiles if function == "fold_rows" else 2 * n_tiles)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_empty_tensors(tiled_forward, second_pass, shape):
    batch, heads, n_q, n_k = shape
    q, k, v = torch.randn(batch, heads, n_q, 16), *torch.randn(2, batch, heads, n_k, 16).unbind(0)
    for actual in after_forward(tiled_forward, second_pass.tiled_row_stats, q, k, v, causal=False):
        assert actual.shape == (batch, heads, n_q)
        assert (actual == 0).all()
    for per_query_head in (False, True):
        function, region = tiled_forward.tiled_softmax_col_sum, {"q_begin": 2, "k_stop": min(n_k, 3)}
        actual = after_forward(tiled_forward, function, q, k, v, per_query_head=per_query_head, **region)
        assert actual.shape == (batch, heads, min(n_k, 3))
        assert (actual == 0).all()
    for function, length in ((second_pass.fold_rows, n_q), (second_pass.fold_cols, n_k)):
        actual = after_forward(tiled_forward, function, q, k, v, fold_max, 2.0)
        assert actual.shape == (batch, heads, length)
        assert (actual == 2).all()


def test_never_makes_the_matrix(tiled_forward, second_pass):
    n, d, tile = 1024, 16, 32
    q, k, v = make_qkv(Case(1, 2, 1, n, n, d, True))
    tiles = {"block_m": tile, "block_n": tile}
    _, lse = tiled_forward.tiled_attention(q, k, v, True, **tiles)
    with LargestTensor() as largest:
        tiled_forward.tiled_softmax_col_sum(q, k, lse, True, per_query_head=True, **tiles)
        second_pass.tiled_row_stats(q, k, lse, True, **tiles)
        second_pass.fold_rows(q, k, lse, fold_max, 0.0, True, **tiles)
        second_pass.fold_cols(q, k, lse, fold_max, 0.0, True, **tiles)
    elements = largest.bytes // q.element_size()
    assert elements <= 2 * max(n * d, tile**2), f"a tensor of {elements} elements was allocated"


@settings(max_examples=40)
@example(group=2, n_q=9, n_k=12, region=(2, 8, 11), blocks=(4, 5), causal=True, left=6)
@given(
    group=st.integers(1, 3),
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    region=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)),
    blocks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    causal=st.booleans(),
    left=st.none() | st.integers(0, 30),
)
def test_any_region(request, group, n_q, n_k, region, blocks, causal, left):
    tiled_forward = request.getfixturevalue("tiled_forward")
    q, k, v = make_qkv(Case(1, 2 * group, 2, n_q, n_k, 8, causal), torch.float64)
    region = min(region[0], n_q), min(region[1], n_q), min(region[2], n_k)
    named = dict(zip(("q_begin", "q_stop", "k_stop", "block_m", "block_n"), (*region, *blocks), strict=True))
    window = {"window": (left, None)}
    expected = (rows_of(result, *region) for result in references(q, k, v, causal, **window))
    function = tiled_forward.tiled_softmax_col_sum
    actual = after_forward(
        tiled_forward, function, q, k, v, causal=causal, options=window, per_query_head=True, **named
    )
    assert_right("total_attention", actual, *expected)
