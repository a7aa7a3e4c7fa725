"""Stage 3: raw row, column and cross-token sums in O(N·D), because scores are linear in q and in k."""

import importlib

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, flat, make_qkv, references
from hypothesis import example, given, settings
from hypothesis import strategies as st

from course.grader import compare
from course.largest_tensor import LargestTensor

SELF = Case(2, 2, 1, 40, 40, 16, True)
HEADS = Case(2, 4, 2, 45, 45, 16, True)
SHAPES = {
    "self": SELF,
    "M < N": Case(1, 4, 2, 21, 70, 16, True),
    "M > N": Case(1, 3, 1, 70, 33, 24, True),
    "far apart": Case(1, 2, 1, 3, 200, 16, True),
    "far beyond": Case(1, 2, 1, 200, 3, 16, True),
}
MASKS = {
    "both sides": {"window": 9},
    "uneven": {"window": (5, 40)},
    "left only": {"window": (33, None)},
    "right only": {"window": (None, 20)},
    "causal window": {"causal": True, "window": (31, None)},
    "diagonal": {"window": (0, 0)},
    "beyond everything": {"window": (2**40, 2**31 - 1)},
}
NARROW = 32.0  # units of rounding: of a window narrower than a chunk, most of two chunks is added and taken away again

each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def linear_sums(graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return flat(graded("stage3_scores_and_sums", "linear_sums"))


def check(linear_sums, q, k, *args, eps_factor=8.0, **options):
    oracle, naive = references(q, k, k, *args, **options)
    row_sum = linear_sums.linear_row_sum(q, k, *args, **options)
    col_sum = linear_sums.linear_col_sum(q, k, *args, **options)
    for name, actual in (("row_sum", row_sum), ("col_sum", col_sum)):
        assert actual.dtype == torch.float32
        result = compare(actual, getattr(oracle, name), getattr(naive, name), eps_factor)
        assert result.ok, f"{name}: error {result.max_error:.3g}, allowed {result.allowed:.3g}"


def of_region(result, n_kv_heads, q_begin, k_stop):
    """Return the oracle's result with its column sums taken over a part of the matrix."""
    scores = result.scores[:, :, q_begin:, :k_stop].unflatten(1, (n_kv_heads, -1))
    return result._replace(col_sum=scores.sum((2, 3), dtype=result.row_sum.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(linear_sums, device, case):
    q, k, _ = make_qkv(case, device=device)
    check(linear_sums, q, k, case.causal)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SELF, CASES[9]], ids=str)
def test_half_precision(linear_sums, device, dtype, case):
    q, k, _ = make_qkv(case, dtype, device)
    check(linear_sums, q, k, True, window=(50, None))


@each_shape
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_masks(linear_sums, device, case, options):
    q, k, _ = make_qkv(case, device=device)
    check(linear_sums, q, k, eps_factor=NARROW, **options)


@each_shape
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (30, None)}], ids=str)
def test_padding(linear_sums, device, case, options):
    q, k, _ = make_qkv(case, device=device)
    real = torch.rand(case.batch, case.n_k, device=device) > 0.3
    real[0, : case.n_k // 2] = False
    check(linear_sums, q, k, eps_factor=NARROW, key_padding_mask=real, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (33, None)}], ids=str)
@pytest.mark.parametrize("case", [SELF, SHAPES["M < N"], SHAPES["M > N"]], ids=["self", "M < N", "M > N"])
def test_cross_token_regions(linear_sums, device, case, options):
    """Splits at the ends, on a chunk's edge and across a chunk; regions whose corner lies off the diagonal."""
    q, k, _ = make_qkv(case, device=device)
    results = references(q, k, k, **options)
    splits = [(split, split) for split in (0, 1, 32, 33)]
    for q_begin, k_stop in [*splits, (case.n_q, 20), (17, case.n_k), (0, 16)]:
        expected = (of_region(result, case.n_kv_heads, q_begin, k_stop) for result in results)
        actual = linear_sums.linear_col_sum(q, k, **options, q_begin=q_begin, k_stop=k_stop)
        assert_right("col_sum", actual, *expected, dtype=torch.float32)


def test_scale_and_strides(linear_sums, device):
    packed = torch.randn(2, 40, 3, 2, 20, device=device)
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    for sm_scale in (-0.3, 0.0):
        check(linear_sums, q, k[:, :1].expand(-1, 2, -1, -1), True, sm_scale)


def test_sums_are_linear_in_q(linear_sums, device):
    q, k, _ = make_qkv(SELF, device=device)
    p = torch.randn_like(q)
    for sums in (linear_sums.linear_row_sum, linear_sums.linear_col_sum):
        expected = 2 * sums(q, k, True, window=(20, None)) - 3 * sums(p, k, True, window=(20, None))
        torch.testing.assert_close(sums(2 * q - 3 * p, k, True, window=(20, None)), expected, rtol=1e-4, atol=1e-4)


def test_order_of_the_keys_does_not_matter(linear_sums, device):
    q, k, _ = make_qkv(SELF, device=device)
    order = torch.randperm(40, device=device)
    row_sum, col_sum = linear_sums.linear_row_sum(q, k), linear_sums.linear_col_sum(q, k)
    torch.testing.assert_close(linear_sums.linear_row_sum(q, k[:, :, order]), row_sum, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear_sums.linear_col_sum(q, k[:, :, order]), col_sum[:, :, order])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(linear_sums, device, value):
    q, k, _ = make_qkv(HEADS, device=device)
    clean = linear_sums.linear_row_sum(q, k, True), linear_sums.linear_col_sum(q, k, True)
    k[1, 0, 35] = value
    row_sum, col_sum = linear_sums.linear_row_sum(q, k, True), linear_sums.linear_col_sum(q, k, True)
    assert torch.equal(row_sum[0], clean[0][0])
    assert torch.equal(row_sum[1, 2:], clean[0][1, 2:])
    assert torch.equal(col_sum[0], clean[1][0])
    assert torch.equal(col_sum[1, 1], clean[1][1, 1])
    assert not row_sum[1, :2, 35:].isfinite().any()
    q[0, 3, 5] = value
    row_sum, col_sum = linear_sums.linear_row_sum(q, k, True), linear_sums.linear_col_sum(q, k, True)
    assert torch.equal(row_sum[0, :3], clean[0][0, :3])
    assert torch.equal(col_sum[0, 0], clean[1][0, 0])
    assert not col_sum[0, 1, :6].isfinite().any()


def test_never_makes_the_matrix(linear_sums, device):
    q, k, _ = make_qkv(Case(1, 1, 1, 500, 500, 16, True), device=device)
    for sums in (linear_sums.linear_row_sum, linear_sums.linear_col_sum):
        with LargestTensor() as largest:
            sums(q, k, True, window=(99, None))
        assert largest.bytes <= 4 * q.numel(), f"{largest.bytes} bytes were allocated"


def test_same_bits_twice_and_where_it_is_told_to(linear_sums, device):
    q, k, _ = make_qkv(SELF, device=device)
    room = torch.empty(2, 2, 40, device=device)
    first = linear_sums.linear_row_sum(q, k, True, window=50, out=room)
    assert first is room
    assert torch.equal(first, linear_sums.linear_row_sum(q, k, True, window=50))
    room = torch.empty(2, 1, 33, device=device)
    first = linear_sums.linear_col_sum(q, k, True, q_begin=33, k_stop=33, out=room)
    assert first is room
    assert torch.equal(first, linear_sums.linear_col_sum(q, k, True, q_begin=33, k_stop=33))


def exact_sums(q, k, causal):
    """Return row and column sums of one head of width 16 in fp64, by prefix sums."""
    q, k = q[0, 0].double(), k[0, 0].double()
    to_row, from_col = (k.cumsum(0), q.flip(0).cumsum(0).flip(0)) if causal else (k.sum(0), q.sum(0))
    return (q * to_row).sum(-1) / 4, (k * from_col).sum(-1) / 4


def check_accuracy(linear_sums, n, causal, device):
    """However many scores are summed, the error stays within four units of fp32's rounding of the largest sum."""
    q, k, _ = make_qkv(Case(1, 1, 1, n, n, 16, causal), device=device)
    actual = linear_sums.linear_row_sum(q, k, causal), linear_sums.linear_col_sum(q, k, causal)
    for name, found, truth in zip(("row", "column"), actual, exact_sums(q, k, causal), strict=True):
        error = (found[0, 0].double() - truth).abs().max().item()
        allowed = 4 * torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert error <= allowed, f"{name} sum: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("causal", [False, True])
def test_accuracy(linear_sums, device, causal):
    check_accuracy(linear_sums, 1024, causal, device)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_accuracy_of_long_sequences(linear_sums, causal):
    check_accuracy(linear_sums, 65536, causal, "cuda")


def test_prefix_sums_carry_on_from_block_to_block(linear_sums, device):
    """Three blocks of two chunks, the last one ragged: a block's sums join those of all blocks before it."""
    config = importlib.import_module("stage3_scores_and_sums.tile_config").LinearSumConfig(16, 4, 2, block=2)
    q, k, _ = make_qkv(Case(1, 1, 1, 70, 80, 16, True), device=device)
    with importlib.import_module("stage2_triton_forward.tile_config").choose(linear_sum=config):
        check(linear_sums, q, k, True)


@settings(max_examples=8)
@example(batch=2, group=3, n_q=40, n_k=70, head_dim=20, causal=True, left=30, right=None, padded=True)
@given(
    batch=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    n_q=st.integers(1, 80),
    n_k=st.integers(1, 80),
    head_dim=st.sampled_from([3, 16, 20]),
    causal=st.booleans(),
    left=st.none() | st.integers(0, 120),
    right=st.none() | st.integers(0, 120),
    padded=st.booleans(),
)
def test_any_shape(request, batch, group, n_q, n_k, head_dim, causal, left, right, padded):
    linear_sums, device = request.getfixturevalue("linear_sums"), request.getfixturevalue("device")
    q, k, _ = make_qkv(Case(batch, 2 * group, 2, n_q, n_k, head_dim, causal), device=device)
    real = torch.rand(batch, n_k, device=device) > 0.3 if padded else None
    check(linear_sums, q, k, causal, eps_factor=NARROW, window=(left, right), key_padding_mask=real)
