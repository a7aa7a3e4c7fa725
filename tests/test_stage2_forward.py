"""Stage 2: the teaching kernel, and the forward loop that the later stages hook into."""

import math

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, default_dtype, flat, make_qkv, references

from stage1_pytorch_tiled.philox import keep_mask

SELF = Case(2, 4, 2, 70, 70, 32, True)
CACHE = Case(1, 4, 2, 21, 90, 16, True)
KERNELS = ["simple_forward", "forward"]


@pytest.fixture
def launch(graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return flat(graded("stage2_triton_forward", "launch"))


def check(kernel, q, k, v, *args):
    output, lse = kernel(q, k, v, *args)
    oracle, naive = references(q, k, v, *args)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(launch, device, kernel, case):
    check(getattr(launch, kernel), *make_qkv(case, device=device), case.causal)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SELF, CACHE, CASES[-1]], ids=str)
def test_half_precision(launch, device, kernel, dtype, case):
    check(getattr(launch, kernel), *make_qkv(case, dtype, device), case.causal)


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_default_dtype_changes_nothing(launch, device, kernel):
    q, k, v = make_qkv(SELF, device=device)
    expected = getattr(launch, kernel)(q, k, v, True)
    with default_dtype(torch.bfloat16):
        actual = getattr(launch, kernel)(q, k, v, True)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sm_scale", [0.05, 0.0, -0.3])
def test_scale(launch, device, kernel, sm_scale):
    check(getattr(launch, kernel), *make_qkv(SELF, device=device), True, sm_scale)


@pytest.mark.parametrize("kernel", KERNELS)
def test_negative_scale_in_whole_tiles(launch, device, kernel):
    case = Case(1, 2, 1, 64, 256, 64, False)  # no key is masked, in several turns of the loop
    check(getattr(launch, kernel), *make_qkv(case, torch.float16, device), False, -0.125)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("magnitude", [1e-4, 300.0])
def test_magnitudes(launch, device, kernel, magnitude):
    check(getattr(launch, kernel), *make_qkv(SELF, device=device, scale=magnitude), True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides(launch, device, kernel):
    packed = torch.randn(2, 70, 3, 4, 20, device=device)  # [B, N, 3, H, D], as fused projections return it
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    k = k[:, :1].expand(-1, 4, -1, -1)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    check(getattr(launch, kernel), q, k, v, True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_unaligned_storage(launch, device, kernel):
    storage = torch.randn(2 * 70 * 33 + 1, device=device)
    q = storage[1:].view(1, 2, 70, 33)[
        ..., :32
    ]  # neither the base address nor the row stride is a multiple of 16 bytes
    check(getattr(launch, kernel), q, q.clone(), q.clone(), True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_see_nothing(launch, device, kernel):
    q, k, v = make_qkv(Case(1, 2, 2, 150, 18, 16, True), device=device)
    output, lse = getattr(launch, kernel)(q, k, v, True)
    torch.testing.assert_close(output[:, :, :132].cpu(), torch.zeros(1, 2, 132, 16))
    torch.testing.assert_close(lse[:, :, :132].cpu(), torch.full((1, 2, 132), -math.inf))
    assert torch.isfinite(lse[:, :, 132:]).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_in_its_head(launch, device, kernel, poison):
    q, k, v = make_qkv(SELF, device=device)
    clean, _ = getattr(launch, kernel)(q, k, v, True)
    k[1, 0, 3, 5] = poison  # the key head of query heads 0 and 1
    v[1, 0, 3, 5] = poison
    output, _ = getattr(launch, kernel)(q, k, v, True)
    untouched = torch.ones(2, 4, dtype=torch.bool)
    untouched[1, :2] = False
    assert torch.equal(output[untouched], clean[untouched])
    assert output[1, :2, 3:].isnan().any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_empty_tensors(launch, device, kernel, shape):
    batch, heads, n_q, n_k = shape
    q, k = torch.randn(batch, heads, n_q, 16, device=device), torch.randn(batch, heads, n_k, 16, device=device)
    check(getattr(launch, kernel), *make_qkv(CASES[0], device=device))  # and one that is not empty
    output, lse = getattr(launch, kernel)(q, k, k)
    torch.testing.assert_close(output.cpu(), torch.zeros(batch, heads, n_q, 16))
    torch.testing.assert_close(lse.cpu(), torch.full((batch, heads, n_q), -math.inf))


@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits_twice(launch, device, kernel):
    q, k, v = make_qkv(SELF, device=device)
    first, second = getattr(launch, kernel)(q, k, v, True), getattr(launch, kernel)(q, k, v, True)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_three_dimensional_inputs(launch, device):
    q, k, v = torch.randn(3, 2, 40, 16, device=device)
    check(launch.simple_forward, q, k, v, True)


def test_dropout_is_the_philox_of_stage_one(launch, device):
    q, k, v = make_qkv(SELF, device=device)
    seed = 12345678901  # more than 32 bits
    heads = torch.arange(8).view(2, 4, 1, 1)
    mask = keep_mask(seed, heads, torch.arange(70)[:, None], torch.arange(70), 0.3).to(device)
    output, lse = launch.forward(q, k, v, True, None, 0.3, seed)
    oracle, naive = references(q, k, v, True, dropout_p=0.3, dropout_mask=mask)
    assert_right("output", output, oracle, naive)
    assert_right("lse", lse, oracle, naive)
