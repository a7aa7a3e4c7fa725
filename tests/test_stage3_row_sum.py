"""Stage 3: raw row sums inside of the forward loop, with compensated summation."""

import math

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, flat, make_qkv, references
from test_stage2_features import FEATURES, options_of

CACHE = Case(2, 2, 1, 21, 130, 16, True)
EMPTY_ROWS = Case(1, 4, 1, 90, 33, 24, True)


@pytest.fixture
def launch(graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return flat(graded("stage3_scores_and_sums", "launch"))


def check(launch, q, k, v, *args, **options):
    output, lse, row_sum = launch.attention_with_row_sum(q, k, v, *args, algorithm="kahan", **options)
    oracle, naive = references(q, k, v, *args, **options)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)
    assert_right("row_sum", row_sum, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize("case", [*CASES[:5], CASES[8], *CASES[10:13], EMPTY_ROWS], ids=str)
def test_matches_oracle(launch, device, case):
    check(launch, *make_qkv(case, device=device), case.causal)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(launch, device, dtype):
    check(launch, *make_qkv(CACHE, dtype, device), True)


@pytest.mark.parametrize("name", ["window", "right window", "softcap", "sinks", "padding", "negative scale"])
def test_features(launch, device, name):
    check(launch, *make_qkv(CACHE, device=device), **options_of(FEATURES[name], CACHE, device))


def test_what_a_running_sum_loses_is_given_back(launch, device):
    """Between a score of 2³⁰ and one of -2³⁰, fp32 has no room for the others, of 0.2 each: they must not be lost."""
    n_k, large = 4096, 2.0**30  # whose unit in the last place is 128: more than all of the keys of a tile
    q, k, v = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, n_k, 16), torch.randn(1, 1, n_k, 16)
    q[..., 0], k[..., 0] = 1.0, 0.2
    k[..., 0, 0], k[..., -1, 0] = large, -large
    q, k, v = (x.to(device) for x in (q, k, v))
    _, _, row_sum = launch.attention_with_row_sum(q, k, v, sm_scale=1.0, algorithm="kahan")
    truth = k[..., 0].double().sum().item()
    plain = 0.0
    for tile in k[0, 0, :, 0].cpu().split(64):
        plain = (torch.tensor(plain) + tile.sum()).item()
    assert truth > 800
    assert abs(plain - truth) > 0.9 * truth, "a plain sum would pass this test"
    error = (row_sum.double() - truth).abs().max().item()
    assert error <= 256, f"error {error}, a plain fp32 sum has {abs(plain - truth)}"


def test_dropout_leaves_the_sums_alone(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    output, lse, row_sum = launch.attention_with_row_sum(q, k, v, True, algorithm="kahan")
    dropped, same_lse, same_sum = launch.attention_with_row_sum(q, k, v, True, dropout_p=0.5, seed=7, algorithm="kahan")
    assert torch.equal(row_sum, same_sum)
    assert torch.equal(lse, same_lse)
    assert not torch.allclose(output, dropped)


def test_writes_where_it_is_told_to_and_the_same_bits_twice(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    room = torch.full((2, 2, 21), math.nan, device=device)
    _, _, first = launch.attention_with_row_sum(q, k, v, True, algorithm="kahan", row_sum=room)
    _, _, second = launch.attention_with_row_sum(q, k, v, True, algorithm="kahan")
    assert first is room
    assert torch.equal(first, second)
