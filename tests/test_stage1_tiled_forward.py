"""Stage 1: attention as a loop over tiles."""

import math

import pytest
import torch
from helpers import CASES, Case, assert_right, flat, make_qkv, references
from hypothesis import example, given, settings
from hypothesis import strategies as st

from course.largest_tensor import LargestTensor
from stage1_pytorch_tiled.philox import keep_mask

SELF = Case(2, 4, 2, 37, 37, 24, True)
CACHE = Case(1, 4, 2, 21, 50, 16, True)


@pytest.fixture
def tiled_attention(graded):
    return flat(graded("stage1_pytorch_tiled", "tiled_forward").tiled_attention)


def check(tiled_attention, q, k, v, *args, tiles=None, **kwargs):
    """Compare output and lse with the oracle, and the dtypes with the contract."""
    output, lse = tiled_attention(q, k, v, *args, **(tiles or {}), **kwargs)
    oracle, naive = references(q, k, v, *args, **kwargs)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    assert_right("lse", lse, oracle, naive, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(tiled_attention, case):
    check(tiled_attention, *make_qkv(case), case.causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [SELF, CACHE], ids=str)
def test_dtypes(tiled_attention, case, dtype):
    check(tiled_attention, *make_qkv(case, dtype), case.causal)


@pytest.mark.parametrize("tiles", [(1, 1), (16, 64), (64, 16), (7, 5), (512, 512)], ids=str)
def test_tile_sizes(tiled_attention, tiles):
    tiles = dict(zip(("block_m", "block_n"), tiles, strict=True))
    check(tiled_attention, *make_qkv(CACHE), True, tiles=tiles)


@pytest.mark.parametrize("causal", [False, True])
def test_three_dimensional_inputs(tiled_attention, causal):
    q, k, v = torch.randn(3, 20, 16), torch.randn(3, 33, 16), torch.randn(3, 33, 16)
    check(tiled_attention, q, k, v, causal)


@pytest.mark.parametrize("sm_scale", [1.0, 0.05, 0.0, -0.3])
def test_scale(tiled_attention, sm_scale):
    check(tiled_attention, *make_qkv(SELF), True, sm_scale)


def test_values_of_another_width(tiled_attention):
    q, k, _ = make_qkv(SELF)
    check(tiled_attention, q, k, torch.randn(*k.shape[:3], 9), True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 5, (3, None), (None, 2), (17, 4), (None, None)], ids=str)
@pytest.mark.parametrize("case", [SELF, CACHE], ids=str)
def test_window(tiled_attention, case, window, causal):
    check(tiled_attention, *make_qkv(case), causal, window=window)


def test_softcap(tiled_attention):
    check(tiled_attention, *make_qkv(SELF, scale=4.0), True, softcap=3.0)


def test_sinks(tiled_attention):
    check(
        tiled_attention,
        *make_qkv(Case(1, 4, 2, 40, 20, 16, True)),
        True,
        sinks=torch.tensor([0.0, 5.0, -math.inf, 50.0]),
    )


@pytest.mark.parametrize("side", ["left", "right", "everything"])
def test_key_padding(tiled_attention, side):
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, {"left": slice(0, 20), "right": slice(20, 37), "everything": slice(None)}[side]] = False
    check(tiled_attention, *make_qkv(SELF), True, key_padding_mask=mask)


def test_dropout_given_its_mask(tiled_attention):
    q, k, v = make_qkv(SELF)
    heads = torch.arange(8).view(2, 4, 1, 1)
    mask = keep_mask(1234, heads, torch.arange(37)[:, None], torch.arange(37), 0.3)
    assert 0.6 < mask.double().mean() < 0.8
    output, lse = tiled_attention(q, k, v, True, dropout_p=0.3, seed=1234)
    oracle, naive = references(q, k, v, True, dropout_p=0.3, dropout_mask=mask)
    assert_right("output", output, oracle, naive)
    assert_right("lse", lse, oracle, naive)


@pytest.mark.parametrize("magnitude", [1e-4, 30.0, 300.0])
def test_magnitudes(tiled_attention, magnitude):
    check(tiled_attention, *make_qkv(SELF, scale=magnitude), True)


def test_any_strides(tiled_attention):
    packed = torch.randn(2, 37, 3, 4, 24)  # [B, N, 3, H, D], as fused projections return it
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    k = k[:, :1].expand(-1, 4, -1, -1)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    check(tiled_attention, q, k, v, True)


def test_inputs_are_left_alone(tiled_attention):
    q, k, v = make_qkv(SELF)
    copies = [x.clone() for x in (q, k, v)]
    tiled_attention(q, k, v, True)
    for x, copy in zip((q, k, v), copies, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0)


def test_rows_that_see_nothing(tiled_attention):
    output, lse = tiled_attention(*make_qkv(Case(1, 2, 2, 40, 18, 16, True)), True)
    torch.testing.assert_close(output[:, :, :22], torch.zeros(1, 2, 22, 16))
    torch.testing.assert_close(lse[:, :, :22], torch.full((1, 2, 22), -math.inf))
    assert torch.isfinite(lse[:, :, 22:]).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_in_its_head(tiled_attention, poison):
    q, k, v = make_qkv(SELF)
    clean, _ = tiled_attention(q, k, v, True)
    k[1, 0, 3, 5] = poison  # the key head of query heads 0 and 1
    output, _ = tiled_attention(q, k, v, True)
    untouched = torch.ones(2, 4, dtype=torch.bool)
    untouched[1, :2] = False
    torch.testing.assert_close(output[untouched], clean[untouched])
    assert output[1, :2, 3:].isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_empty_tensors(tiled_attention, shape):
    batch, heads, n_q, n_k = shape
    q, k = torch.randn(batch, heads, n_q, 16), torch.randn(batch, heads, n_k, 16)
    output, lse = tiled_attention(q, k, k)
    torch.testing.assert_close(output, torch.zeros(batch, heads, n_q, 16))
    torch.testing.assert_close(lse, torch.full((batch, heads, n_q), -math.inf))


def test_same_bits_twice(tiled_attention):
    q, k, v = make_qkv(SELF)
    first, second = tiled_attention(q, k, v, True), tiled_attention(q, k, v, True)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("causal", [False, True])
def test_only_visible_tiles_are_visited_once(tiled_attention, causal):
    visits = []
    q, k, v = make_qkv(Case(1, 1, 1, 64, 96, 16, causal))
    tiled_attention(q, k, v, causal, on_logits=lambda tile: visits.append((tile.q_rows.start, tile.k_cols.start)))
    tiles = [(m, n) for m in range(0, 64, 16) for n in range(0, 96, 16)]
    assert sorted(visits) == [(m, n) for m, n in tiles if not causal or n <= m + 15 + 32]


def test_never_makes_the_matrix(tiled_attention):
    n, d, tile = 1024, 64, 16
    q, k, v = make_qkv(Case(1, 2, 1, n, n, d, True))
    with LargestTensor() as largest:
        tiled_attention(q, k, v, True)
    elements = largest.bytes // q.element_size()
    assert elements <= 2 * max(n * d, tile**2), f"a tensor of {elements} elements was allocated"


@settings(max_examples=40)
@example(batch=2, n_kv_heads=2, group=2, n_q=9, n_k=12, head_dim=5, blocks=(4, 5), causal=True, left=6, right=None)
@given(
    batch=st.integers(1, 2),
    n_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    head_dim=st.integers(1, 20),
    blocks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    causal=st.booleans(),
    left=st.none() | st.integers(0, 30),
    right=st.none() | st.integers(0, 30),
)
def test_any_shape(request, batch, n_kv_heads, group, n_q, n_k, head_dim, blocks, causal, left, right):
    tiled_attention = request.getfixturevalue("tiled_attention")
    case = Case(batch, n_kv_heads * group, n_kv_heads, n_q, n_k, head_dim, causal)
    tiles = {"block_m": blocks[0], "block_n": blocks[1]}
    check(tiled_attention, *make_qkv(case, torch.float64), causal, window=(left, right), tiles=tiles)
