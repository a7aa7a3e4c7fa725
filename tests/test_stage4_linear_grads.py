"""Stage 4: gradients of the raw sums in O(N·D): a query gets a sum of keys, a key gets a sum of queries."""

import pytest
import torch
from helpers import CASES, HALF, Case, default_dtype, flat, make_qkv
from test_stage3_linear_sums import MASKS, NARROW, SHAPES

from course.grader import compare
from course.largest_tensor import LargestTensor
from stage1_pytorch_tiled.dense import naive_attention

SELF = SHAPES["self"]
WHOLE = (0, None)  # q_begin, k_stop

FAR = ("M < N", "M > N", "far beyond")

each_shape = pytest.mark.parametrize("case", [SHAPES[name] for name in FAR], ids=FAR)


@pytest.fixture
def linear_grads(graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return flat(graded("stage4_backward", "linear_grads"))


def dense_gradients(q, k, grad, of_rows, region, options):
    """Return the gradients of q and k from that of the row or column sums, by the definition."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    scores = naive_attention(q, k, k, **options).scores[:, :, region[0] :, : region[1]]
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = scores.sum(-1 if of_rows else -2, dtype=wide)
    sums = sums if of_rows else sums.unflatten(1, (k.shape[1], -1)).sum(2)
    return torch.autograd.grad(sums, (q, k), grad.to(wide))


def check(linear_grads, q, k, *, of_rows=(True, False), region=WHOLE, eps_factor=8.0, **options):
    for rows in of_rows:
        n_k = k.shape[2] if region[1] is None else region[1]
        shape = q.shape[:3] if rows else (*k.shape[:2], n_k)
        grad = torch.randn(shape, device=q.device)
        if rows:
            actual = linear_grads.linear_row_sum_grads(q, k, grad, **options)
        else:
            actual = linear_grads.linear_col_sum_grads(q, k, grad, **options, q_begin=region[0])
        term = (q.shape[-1] ** -0.5 * grad.abs().max() * max(q.abs().max(), k.abs().max())).item()
        oracle = dense_gradients(q.double(), k.double(), grad, rows, region, options)
        naive = dense_gradients(q, k, grad, rows, region, options)
        for name, *three in zip("qk", actual, oracle, naive, strict=True):
            assert three[0].dtype == torch.float32
            error, allowed, _ = compare(*three, eps_factor)
            allowed += 4 * torch.finfo(torch.float32).eps * term  # where what is added is taken away again
            assert error <= allowed, f"{name}, {'row' if rows else 'column'} sums: error {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(linear_grads, device, case):
    q, k, _ = make_qkv(case, device=device)
    check(linear_grads, q, k, causal=case.causal)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SELF, CASES[9]], ids=str)
def test_half_precision(linear_grads, device, dtype, case):
    q, k, _ = make_qkv(case, dtype, device)
    check(linear_grads, q, k, causal=True, window=(50, None))


@each_shape
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_masks(linear_grads, device, case, options):
    q, k, _ = make_qkv(case, device=device)
    check(linear_grads, q, k, eps_factor=NARROW, **options)


@each_shape
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (30, 7)}], ids=str)
def test_padding(linear_grads, device, case, options):
    q, k, _ = make_qkv(case, device=device)
    real = torch.rand(case.batch, case.n_k, device=device) > 0.3
    real[0, : case.n_k // 2] = False
    check(linear_grads, q, k, eps_factor=NARROW, key_padding_mask=real, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (33, None)}], ids=str)
@pytest.mark.parametrize("case", [SELF, SHAPES["M < N"], SHAPES["M > N"]], ids=["self", "M < N", "M > N"])
def test_cross_token_regions(linear_grads, device, case, options):
    """Splits at the ends, on a chunk's edge and across a chunk; regions whose corner lies off the diagonal."""
    q, k, _ = make_qkv(case, device=device)
    splits = [(min(split, case.n_q), split) for split in (1, 32, 33, case.n_k)]
    for region in [*splits, (case.n_q, 20), (17, case.n_k), (0, 16)]:
        check(linear_grads, q, k, of_rows=[False], region=region, eps_factor=NARROW, **options)


def test_scale_and_strides(linear_grads, device):
    packed = torch.randn(2, 40, 3, 2, 20, device=device)
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    for sm_scale in (-0.3, 0.0):
        check(linear_grads, q, k[:, :1].expand(-1, 2, -1, -1), causal=True, sm_scale=sm_scale)


def test_expanded_gradients(linear_grads, device):
    """What `row_sum.sum().backward()` and `col_sum.sum().backward()` hand over; both add up all scores."""
    q, k, _ = make_qkv(SHAPES["M < N"], device=device)
    one = torch.ones((), device=device)
    by_rows = linear_grads.linear_row_sum_grads(q, k, one.expand(q.shape[:3]), True)
    by_columns = linear_grads.linear_col_sum_grads(q, k, one.expand(k.shape[:3]), True)
    for rows, columns in zip(by_rows, by_columns, strict=True):
        torch.testing.assert_close(rows, columns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(linear_grads, device, value):
    q, k, _ = make_qkv(Case(2, 4, 2, 45, 45, 16, True), device=device)
    row_grad, col_grad = torch.randn(2, 4, 45, device=device), torch.randn(2, 2, 45, device=device)

    def gradients():
        of_rows = linear_grads.linear_row_sum_grads(q, k, row_grad, True)
        return *of_rows, *linear_grads.linear_col_sum_grads(q, k, col_grad, True)

    clean = gradients()
    k[1, 0, 35] = value  # the key head of query heads 0 and 1
    for poisoned, expected in zip(gradients(), clean, strict=True):
        others = poisoned.shape[1] // 2
        assert torch.equal(poisoned[0], expected[0])
        assert torch.equal(poisoned[1, others:], expected[1, others:])
    assert not gradients()[0][1, :2, 35:].isfinite().any()
    assert not gradients()[2][1, :2, 35:].isfinite().any()


def test_another_default_dtype_changes_nothing(linear_grads, device):
    q, k, _ = make_qkv(SELF, device=device)
    grad = torch.randn(q.shape[:3], device=device)
    expected = linear_grads.linear_row_sum_grads(q, k, grad, True)
    with default_dtype(torch.bfloat16):
        actual = linear_grads.linear_row_sum_grads(q, k, grad, True)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


def test_empty_tensors(linear_grads, device):
    q, k, _ = make_qkv(CASES[0], device=device)
    check(linear_grads, q, k)  # one that is not empty
    for shape in [(0, 2, 2, 5, 5), (1, 0, 2, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)]:
        q, k, _ = make_qkv(Case(*shape, 16, False), device=device)
        of_rows = linear_grads.linear_row_sum_grads(q, k, torch.randn(q.shape[:3], device=device))
        of_columns = linear_grads.linear_col_sum_grads(q, k, torch.randn(k.shape[:3], device=device))
        for grads in (of_rows, of_columns):
            for grad, x in zip(grads, (q, k), strict=True):
                assert torch.equal(grad, torch.zeros_like(x))


def test_never_makes_the_matrix(linear_grads, device):
    q, k, _ = make_qkv(Case(1, 1, 1, 700, 700, 16, True), device=device)
    grad = torch.randn(1, 1, 700, device=device)
    for gradients in (linear_grads.linear_row_sum_grads, linear_grads.linear_col_sum_grads):
        with LargestTensor() as largest:
            gradients(q, k, grad, True, window=(99, None))
        assert largest.bytes <= 4 * q.numel(), f"{largest.bytes} bytes were allocated"


def test_same_bits_twice(linear_grads, device):
    q, k, _ = make_qkv(SHAPES["M > N"], device=device)
    grad = torch.randn(q.shape[:3], device=device)
    first, second = (linear_grads.linear_row_sum_grads(q, k, grad, True, window=50) for _ in range(2))
    assert all(map(torch.equal, first, second))
    grad = torch.randn(1, 1, 20, device=device)
    first, second = (linear_grads.linear_col_sum_grads(q, k, grad, True, q_begin=20) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_accuracy_of_long_sequences(linear_grads, causal):
    """However many vectors are summed, the error stays within 16 units of fp32's rounding of the largest sum."""
    q, k, _ = make_qkv(Case(1, 1, 1, 65536, 65536, 16, causal), device="cuda")
    grad = torch.randn(1, 1, 65536, device="cuda")
    wide = q.double() * grad[..., None], k.double()
    to_q, to_k = (wide[1].cumsum(2), wide[0].flip(2).cumsum(2).flip(2)) if causal else (wide[1].sum(2), wide[0].sum(2))
    expected = grad[..., None] * to_q.view(1, 1, -1, 16) / 4, to_k.view(1, 1, -1, 16).expand_as(k) / 4
    for actual, truth in zip(linear_grads.linear_row_sum_grads(q, k, grad, causal), expected, strict=True):
        error = (actual.double() - truth).abs().max().item()
        allowed = 16 * torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
