"""Stage 3: softmax sums down the columns, by a second pass in which each key has one owner."""

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, flat, make_qkv, references
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_stage2_features import FEATURES, options_of
from test_stage2_tiles import WINDOWS, key_mask, visible_matrix

from course.largest_tensor import LargestTensor

triton = pytest.importorskip("triton", reason="Triton has no wheels for this platform")
tl = triton.language

SELF = Case(2, 2, 1, 40, 40, 16, True)
HEADS = Case(2, 2, 2, 33, 33, 16, True)
CACHE = Case(1, 2, 1, 21, 70, 16, True)
EMPTY_ROWS = Case(1, 2, 1, 100, 70, 16, True)  # the first 30 see nothing; the last have whole tiles
BLOCK = 16

each_case = pytest.mark.parametrize("case", [SELF, CACHE, EMPTY_ROWS], ids=["self", "M < N", "M > N"])


@pytest.fixture
def launch(graded):
    return flat(graded("stage3_scores_and_sums", "launch"))


@pytest.fixture
def softmax_col_sum(graded):
    return flat(graded("stage3_scores_and_sums", "column_sums").softmax_col_sum)


def of_region(result, q_begin, q_stop, k_stop):
    """Return the oracle's result with its sums per query head taken over a part of the matrix."""
    return result._replace(total_attention=result.weights[:, :, q_begin:q_stop, :k_stop].sum(-2))


def exact_lse(oracle):
    return oracle.lse.float().contiguous()


def without_sinks(options):
    """Return the options of the second pass: sinks are in the lse."""
    return {name: x for name, x in options.items() if name != "sinks"}


@pytest.mark.parametrize("case", [*CASES[:6], *CASES[9:12], CASES[14]], ids=str)
def test_matches_oracle(launch, device, case):
    q, k, v = make_qkv(case, device=device)
    oracle, naive = references(q, k, v, case.causal)
    output, lse, col_sum = launch.attention_with_softmax_col_sum(q, k, v, case.causal)
    assert_right("output", output, oracle, naive, dtype=torch.float32)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)
    assert_right("softmax_col_sum", col_sum, oracle, naive, dtype=torch.float32)


@each_case
@pytest.mark.parametrize("name", FEATURES)
def test_features(softmax_col_sum, device, case, name):
    q, k, v = make_qkv(case, device=device)
    options = options_of(FEATURES[name], case, device)
    oracle, naive = references(q, k, v, **options, split=20)
    lse, options = exact_lse(oracle), without_sinks(options)
    assert_right("softmax_col_sum", softmax_col_sum(q, k, lse, **options), oracle, naive, dtype=torch.float32)
    if case is SELF:
        total = softmax_col_sum(q, k, lse, **options, per_query_head=True)
        assert_right("total_attention", total, oracle, naive, dtype=torch.float32)
    sums = softmax_col_sum(q, k, lse, **options, q_begin=20, k_stop=20)
    assert_right("cross_token_softmax_sum", sums, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(launch, device, dtype):
    q, k, v = make_qkv(SELF, dtype, device)
    options = {"causal": True, "window": (40, None), "softcap": 5.0, "sinks": torch.randn(2, device=device).to(dtype)}
    oracle, naive = references(q, k, v, **options)
    _, _, col_sum = launch.attention_with_softmax_col_sum(q, k, v, **options)
    assert_right("softmax_col_sum", col_sum, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize("name", ["causal", "softcap", "sinks", "padding"])
def test_stored_scores_give_the_same_sums(launch, device, name):
    q, k, v = make_qkv(CACHE, device=device)
    options = options_of(FEATURES[name], CACHE, device)
    oracle, naive = references(q, k, v, **options, split=17)
    region = {"q_begin": 17, "k_stop": 17}
    output, lse, sums = launch.attention_with_softmax_col_sum(q, k, v, **options, **region, buffered=True)
    assert_right("output", output, oracle, naive, dtype=torch.float32)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)
    assert_right("cross_token_softmax_sum", sums, oracle, naive, dtype=torch.float32)
    *_, recomputed = launch.attention_with_softmax_col_sum(q, k, v, **options, **region)
    torch.testing.assert_close(sums, recomputed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_stored_scores_are_rounded(launch, device, dtype):
    """A logit kept in half precision is off by eps/2 of itself, and the weight by e to that power."""
    q, k, v = make_qkv(CACHE, dtype, device)
    oracle, _ = references(q, k, v, True, split=17)
    region = {"q_begin": 17, "k_stop": 17, "buffered": True}
    *_, sums = launch.attention_with_softmax_col_sum(q, k, v, True, **region)
    off = torch.finfo(dtype).eps / 2 * oracle.scores.abs().max().item()
    torch.testing.assert_close(sums.double(), oracle.cross_token_softmax_sum, rtol=off, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", [CACHE, Case(1, 4, 2, 70, 40, 16, True)], ids=["M < N", "M > N"])
def test_part_of_the_queries(softmax_col_sum, device, case, causal):
    """Query windows of any place and length, keys cut off or not, and tiles that no query of the window sees."""
    q, k, v = make_qkv(case, device=device)
    results = references(q, k, v, causal)
    lse, n_q, n_k = exact_lse(results[0]), case.n_q, case.n_k
    for q_begin, q_stop, k_stop in [
        (0, 16, n_k),
        (5, 6, n_k - 1),
        (n_q - 7, n_q, None),
        (n_q - 16, None, 20),
        (3, 19, 1),
        (7, 7, 9),
        (n_q, n_q, n_k),
    ]:
        region = {"q_begin": q_begin, "q_stop": q_stop, "k_stop": k_stop}
        expected = (of_region(result, q_begin, q_stop, k_stop) for result in results)
        total = softmax_col_sum(q, k, lse, causal, **region, per_query_head=True)
        assert_right("total_attention", total, *expected, dtype=torch.float32)


@pytest.mark.parametrize(
    ("case", "split", "dtype"),
    [
        (Case(1, 1, 1, 70, 200, 24, False), 46, torch.float32),  # less than a tile of queries is left
        (Case(1, 2, 1, 64, 64, 16, True), 32, torch.float32),  # causal, and nothing but whole tiles
        (Case(1, 2, 1, 128, 128, 16, True), 64, torch.float16),
        (Case(1, 2, 1, 64, 96, 16, True), 48, torch.float16),
        (Case(1, 1, 1, 33, 33, 16, True), 0, torch.float32),
        (Case(1, 1, 1, 33, 33, 16, True), 33, torch.float32),
        (Case(1, 1, 1, 20, 70, 16, True), 50, torch.float32),  # a split past the last query
    ],
    ids=str,
)
def test_no_whole_tile_is_left(launch, device, case, split, dtype):
    """Loops over no tile at all, which a compiler must not take for endless ones."""
    q, k, v = make_qkv(case, dtype, device)
    oracle, naive = references(q, k, v, case.causal, split=split)
    *_, everything = launch.attention_with_softmax_col_sum(q, k, v, case.causal)
    assert_right("softmax_col_sum", everything, oracle, naive)
    region = {"q_begin": min(split, case.n_q), "k_stop": split}
    *_, sums = launch.attention_with_softmax_col_sum(q, k, v, case.causal, **region)
    assert_right("cross_token_softmax_sum", sums, oracle, naive)


@pytest.mark.parametrize("name", ["full", "causal", "padding", "sinks"])
def test_sums_add_up_to_the_rows_that_see_a_key(launch, device, name):
    case = Case(1, 4, 2, 70, 40, 16, True)
    q, k, v = make_qkv(case, device=device)
    options = options_of(FEATURES[name], case, device)
    _, lse, total = launch.attention_with_softmax_col_sum(q, k, v, **options, per_query_head=True)
    share = torch.isfinite(lse).float()
    if "sinks" in options:
        share *= 1 - torch.exp(options["sinks"][:, None] - lse).nan_to_num(posinf=0)
    torch.testing.assert_close(total.sum(-1), share.sum(-1), rtol=1e-5, atol=1e-4)


def test_permuted_keys_permute_the_sums(launch, device):
    q, k, v = make_qkv(SELF, device=device)
    order = torch.randperm(40, device=device)
    *_, sums = launch.attention_with_softmax_col_sum(q, k, v)
    *_, permuted = launch.attention_with_softmax_col_sum(q, k[:, :, order], v[:, :, order])
    torch.testing.assert_close(permuted, sums[:, :, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_segments_add_up(softmax_col_sum, device, causal):
    """What a key gets from the queries before the split and from those behind it is all that it gets."""
    q, k, v = make_qkv(SELF, device=device)
    lse = exact_lse(references(q, k, v, causal)[0])
    everything = softmax_col_sum(q, k, lse, causal)
    for split in (1, 33):
        before = softmax_col_sum(q, k, lse, causal, q_stop=split)
        across = softmax_col_sum(q, k, lse, causal, q_begin=split, k_stop=split)
        behind = softmax_col_sum(q, k, lse, causal, q_begin=split)
        torch.testing.assert_close(before[..., :split] + across, everything[..., :split], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(before + behind, everything, rtol=1e-5, atol=1e-5)
        assert torch.equal(behind[..., :split], across)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(launch, device, value):
    q, k, v = make_qkv(HEADS, device=device)
    *_, clean = launch.attention_with_softmax_col_sum(q, k, v, True)
    k[1, 0, 30] = value
    *_, sums = launch.attention_with_softmax_col_sum(q, k, v, True)
    assert torch.equal(sums[0], clean[0])
    assert torch.equal(sums[1, 1], clean[1, 1])
    assert not sums[1, 0].isfinite().all()


def test_large_logits(launch, device):
    q, k, v = make_qkv(CACHE, device=device, scale=300.0)
    oracle, naive = references(q, k, v, True)
    *_, sums = launch.attention_with_softmax_col_sum(q, k, v, True)
    rounding = 8 * torch.finfo(torch.float32).eps * oracle.scores.abs().max().item()  # of a logit and of the lse
    assert_right("softmax_col_sum", sums, oracle, naive, atol=rounding)


def test_any_strides(launch, device):
    packed = torch.randn(2, 40, 3, 2, 20, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    k = k[:, :1].expand(-1, 2, -1, -1)
    oracle, naive = references(q, k, v, True)
    *_, sums = launch.attention_with_softmax_col_sum(q, k, v, True)
    assert_right("softmax_col_sum", sums, oracle, naive)


def test_dropout_leaves_the_sums_alone(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    output, _, sums = launch.attention_with_softmax_col_sum(q, k, v, True)
    dropped, _, same_sums = launch.attention_with_softmax_col_sum(q, k, v, True, dropout_p=0.5, seed=7)
    assert torch.equal(sums, same_sums)
    assert not torch.allclose(output, dropped)


def test_same_bits_twice_and_where_it_is_told_to(softmax_col_sum, device):
    q, k, v = make_qkv(SELF, device=device)
    lse = exact_lse(references(q, k, v, True)[0])
    room = torch.empty(2, 1, 40, device=device)
    first = softmax_col_sum(q, k, lse, True, out=room)
    assert first is room
    assert torch.equal(first, softmax_col_sum(q, k, lse, True))


def test_never_makes_the_matrix(launch, device):
    q, k, v = make_qkv(Case(1, 1, 1, 600, 600, 16, True), torch.float16, device)
    with LargestTensor() as largest:
        launch.attention_with_softmax_col_sum(q, k, v, True, window=(30, None))
    assert largest.bytes <= 16 * q.numel(), f"{largest.bytes} bytes were allocated"


@triton.jit
def queries_kernel(out_ptr, mask, region, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VISIBLE_QUERIES: tl.constexpr):
    ends = VISIBLE_QUERIES(mask, region, tl.program_id(0) * BLOCK_N, BLOCK_M, BLOCK_N)
    out_ptr += tl.program_id(0) * 4
    tl.store(out_ptr, ends[0])
    tl.store(out_ptr + 1, ends[1])
    tl.store(out_ptr + 2, ends[2])
    tl.store(out_ptr + 3, ends[3])


@pytest.mark.parametrize(("causal", "window"), WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize(("n_q", "n_k"), [(39, 40), (40, 40), (20, 90), (90, 20), (50, 1), (64, 33)])
@pytest.mark.parametrize("block_m", [16, 32])
def test_visible_queries(graded, device, n_q, n_k, causal, window, block_m):
    module = graded("stage3_scores_and_sums", "column_sum_kernel")
    mask = key_mask(n_q, n_k, causal, window)
    visible = visible_matrix(n_q, n_k, causal, window)
    for q_begin, q_stop in [(0, n_q), (0, n_q // 2), (n_q // 3, n_q), (7, 9)]:
        found = torch.full((triton.cdiv(n_k, BLOCK), 4), -1, dtype=torch.int32, device=device)
        queries_kernel[(len(found),)](
            found,
            mask,
            module.Region(q_begin, q_stop, n_k),
            BLOCK_M=block_m,
            BLOCK_N=BLOCK,
            VISIBLE_QUERIES=module.visible_queries,
        )
        for columns, ends in zip(visible.split(BLOCK, 1), found.tolist(), strict=True):
            begin, whole_begin, whole_stop, stop = ends
            assert (begin - q_begin) % block_m == (whole_begin - q_begin) % block_m == 0
            assert (whole_stop - q_begin) % block_m == 0
            seen = columns.any(1).nonzero().flatten()
            seen = seen[(seen >= q_begin) & (seen < q_stop)].tolist()
            if seen:
                assert (begin, stop) == (seen[0] - (seen[0] - q_begin) % block_m, seen[-1] + 1)
            else:
                assert stop - begin < block_m  # at worst one tile, masked altogether
            starts = range(q_begin, q_stop - block_m + 1, block_m)
            whole = [start for start in starts if columns[start : start + block_m].all()]
            assert list(range(whole_begin, whole_stop, block_m)) == whole


@settings(max_examples=8)
@example(group=3, n_q=40, n_k=70, region=(5, 35, 66), causal=True, left=50, right=None, padded=True)
@given(
    group=st.sampled_from([1, 3]),
    n_q=st.integers(1, 70),
    n_k=st.integers(1, 70),
    region=st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(1, 80)),
    causal=st.booleans(),
    left=st.none() | st.integers(0, 90),
    right=st.none() | st.integers(0, 90),
    padded=st.booleans(),
)
def test_any_region(request, group, n_q, n_k, region, causal, left, right, padded):
    softmax_col_sum, device = request.getfixturevalue("softmax_col_sum"), request.getfixturevalue("device")
    q, k, v = make_qkv(Case(1, group, 1, n_q, n_k, 16, causal), device=device)
    real = torch.rand(1, n_k, device=device) > 0.3 if padded else None
    region = tuple(min(x, n) for x, n in zip(region, (n_q, n_q, n_k), strict=True))
    masks = {"causal": causal, "window": (left, right), "key_padding_mask": real}
    results = references(q, k, v, **masks)
    named = dict(zip(("q_begin", "q_stop", "k_stop"), region, strict=True))
    total = softmax_col_sum(q, k, exact_lse(results[0]), **masks, **named, per_query_head=True)
    assert_right("total_attention", total, *(of_region(result, *region) for result in results))
