"""Stage 3: how each query spreads its attention, out of the one forward loop."""

import math

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, flat, make_qkv, references
from test_stage2_features import FEATURES, options_of

STATS = ("entropy", "max_weight", "mean_distance")
CACHE = Case(2, 2, 1, 21, 130, 16, True)
EMPTY_ROWS = Case(1, 3, 1, 90, 33, 24, True)


@pytest.fixture
def launch(graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return flat(graded("stage3_scores_and_sums", "launch"))


def spread(oracle):
    """Return the widest row's Σ_j p·|distance - mean distance|: what weights that are off, relatively, are off by."""
    n_q, n_k = oracle.weights.shape[2:]
    positions = torch.arange(n_k - n_q, n_k, device=oracle.weights.device)
    distance = (positions[:, None] - torch.arange(n_k, device=oracle.weights.device)).abs()
    return (oracle.weights * (distance - oracle.mean_distance[..., None]).abs()).sum(-1).max().item()


def check(launch, q, k, v, *args, **options):
    output, lse, *stats = launch.attention_with_stats(q, k, v, *args, **options)
    oracle, naive = references(q, k, v, *args, **options)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)
    rounding = 4 * torch.finfo(torch.float32).eps * oracle.scores.abs().max().item()  # of a logit, hence of its weight
    atol = {"entropy": rounding, "max_weight": rounding, "mean_distance": rounding * spread(oracle)}
    for name, x in zip(STATS, stats, strict=True):
        assert_right(name, x, oracle, naive, dtype=torch.float32, atol=atol[name])
    return dict(zip(STATS, stats, strict=True))


@pytest.mark.parametrize("case", [*CASES[:5], CASES[8], *CASES[10:12], *CASES[13:15], EMPTY_ROWS], ids=str)
def test_matches_oracle(launch, device, case):
    check(launch, *make_qkv(case, device=device), case.causal)


@pytest.mark.parametrize("name", FEATURES)
def test_features(launch, device, name):
    check(launch, *make_qkv(CACHE, device=device), **options_of(FEATURES[name], CACHE, device))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(launch, device, dtype):
    check(launch, *make_qkv(CACHE, dtype, device), True, window=(100, None))


@pytest.mark.parametrize("case", [CACHE, Case(1, 1, 1, 40, 200, 16, False)], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 20.0, 300.0])
def test_magnitudes(launch, device, case, scale):
    """Logits that hardly differ, and ones in the hundreds, whose entropy lies near 0."""
    check(launch, *make_qkv(case, device=device, scale=scale), case.causal)


def test_the_max_grows_from_tile_to_tile(launch, device):
    """Every tile of keys outweighs those before it, so that all that was summed must be rescaled each time."""
    q, k, v = make_qkv(Case(1, 1, 1, 16, 300, 16, False), device=device)
    q[..., 0], k[..., 0] = 2.0, torch.linspace(-4, 4, 300, device=device)
    stats = check(launch, q, k, v)
    assert (stats["entropy"] > 1).any()
    check(launch, q, k.flip(2), v)


def test_uniform_attention(launch, device):
    q, k, v = make_qkv(Case(1, 1, 1, 70, 70, 16, True), device=device)
    _, _, entropy, max_weight, mean_distance = launch.attention_with_stats(torch.zeros_like(q), k, v, True)
    seen = torch.arange(1, 71, device=device, dtype=torch.float32)
    torch.testing.assert_close(entropy[0, 0], seen.log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(max_weight[0, 0], 1 / seen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean_distance[0, 0], (seen - 1) / 2, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing(launch, device):
    q, k, v = make_qkv(EMPTY_ROWS, device=device)
    _, lse, *stats = launch.attention_with_stats(q, k, v, True)
    assert torch.equal(lse[:, :, :57].cpu(), torch.full((1, 3, 57), -math.inf))
    for x in stats:
        assert not x[:, :, :57].any()
    assert stats[1][:, :, 57:].all()


def test_dropout_leaves_the_stats_alone(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    output, *results = launch.attention_with_stats(q, k, v, True)
    dropped, *same_results = launch.attention_with_stats(q, k, v, True, dropout_p=0.5, seed=7)
    assert all(torch.equal(*pair) for pair in zip(results, same_results, strict=True))
    assert not torch.allclose(output, dropped)


def test_what_is_not_finite_stays_in_its_head(launch, device):
    q, k, v = make_qkv(Case(2, 2, 2, 21, 90, 16, True), device=device)
    *_, entropy, max_weight, mean_distance = launch.attention_with_stats(q, k, v, True)
    k[1, 0, 80] = math.nan
    *_, entropy_now, max_weight_now, mean_distance_now = launch.attention_with_stats(q, k, v, True)
    for before, after in (
        (entropy, entropy_now),
        (max_weight, max_weight_now),
        (mean_distance, mean_distance_now),
    ):
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1, 1], before[1, 1])
    assert entropy_now[1, 0, -1].isnan()
