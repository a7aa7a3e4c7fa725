"""Stage 2: everything that the forward loop does beside the plain formula, with whole keys and with split ones."""

import pytest
import torch
from helpers import HALF, Case, assert_right, flat, make_qkv, references
from hypothesis import example, given, settings
from hypothesis import strategies as st

from course.largest_tensor import LargestTensor
from stage1_pytorch_tiled.philox import keep_mask

SHAPES = {
    "self": Case(2, 4, 2, 70, 150, 24, True),
    "M > N": Case(1, 4, 1, 150, 70, 32, True),
    "one query": Case(2, 4, 2, 1, 300, 16, True),
    "few queries": Case(1, 2, 2, 5, 300, 64, True),
}
IN_SPLITS = {  # fewer rows: merging takes a program for each, and the interpreter runs one after the other
    SHAPES["self"]: Case(1, 4, 2, 17, 100, 24, True),
    SHAPES["M > N"]: Case(1, 2, 1, 40, 21, 32, True),
}
FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 40},
    "causal window": {"causal": True, "window": (33, None)},
    "right window": {"window": (None, 70)},
    "diagonal": {"window": (0, 0)},
    "softcap": {"softcap": 2.0, "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "padding": {"key_padding_mask": True, "causal": True, "window": 90},
    "negative scale": {"sm_scale": -0.5, "causal": True},
    "scale of zero": {"sm_scale": 0.0},
}

each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
each_feature = pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
splits = pytest.mark.parametrize("n_splits", [1, 3])


@pytest.fixture
def attention_forward(graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return flat(graded("stage2_triton_forward", "split_kv").attention_forward)


def options_of(feature, case, device, dtype=torch.float32):
    """Return a feature's arguments with its tensors drawn."""
    options = dict(feature)
    if "sinks" in options:
        options["sinks"] = torch.randn(case.n_heads, device=device).to(dtype)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = torch.rand(case.batch, case.n_k, device=device) > 0.3
    return options


def check(attention_forward, q, k, v, n_splits=1, **options):
    output, lse = attention_forward(q, k, v, n_splits=n_splits, **options)
    oracle, naive = references(q, k, v, **options)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)


@each_shape
@each_feature
@splits
def test_features(attention_forward, device, case, feature, n_splits):
    case = case if n_splits == 1 else IN_SPLITS.get(case, case)
    options = options_of(feature, case, device)
    check(attention_forward, *make_qkv(case, device=device), n_splits=n_splits, **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["one query"]], ids=["self", "one query"])
@pytest.mark.parametrize("feature", [FEATURES[f] for f in ("causal window", "softcap", "sinks", "padding")], ids=str)
def test_features_in_half_precision(attention_forward, device, case, feature, dtype):
    options = options_of(feature, case, device, dtype)
    check(attention_forward, *make_qkv(case, dtype, device), **options)


@pytest.mark.parametrize("width", [9, 32, 100])
def test_values_of_another_width(attention_forward, device, width):
    case = SHAPES["self"]
    q, k, _ = make_qkv(case, device=device)
    v = torch.randn(*k.shape[:3], width, device=device)
    check(attention_forward, q, k, v, causal=True)
    check(attention_forward, q[:, :, :1], k, v, causal=True, n_splits=2)


def test_weights_of_a_row_add_up_to_one(attention_forward, device):
    q, k, _ = make_qkv(SHAPES["M > N"], device=device)
    output, lse = attention_forward(q, k, torch.ones_like(k), causal=True, window=30)
    sees = torch.isfinite(lse)[..., None].expand_as(output).float()
    assert 0 < sees.mean() < 1
    torch.testing.assert_close(output, sees)


def test_order_of_the_keys_does_not_matter(attention_forward, device):
    q, k, v = make_qkv(SHAPES["self"], device=device)
    order = torch.randperm(k.shape[2], device=device)
    for rows, n_splits in ((70, 1), (9, 4)):
        q = q[:, :, :rows]
        output, lse = attention_forward(q, k, v, n_splits=n_splits)
        permuted, same_lse = attention_forward(q, k[:, :, order], v[:, :, order], n_splits=n_splits)
        torch.testing.assert_close(permuted, output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(same_lse, lse, rtol=1e-5, atol=1e-5)


def test_never_makes_the_matrix(attention_forward, device):
    q, k, v = make_qkv(Case(1, 2, 1, 700, 700, 16, True), device=device)
    for rows, options in ((700, {}), (700, {"window": 50}), (100, {"n_splits": 2})):
        with LargestTensor() as largest:
            attention_forward(q[:, :, -rows:], k, v, causal=True, **options)
        two_outputs = 2 * 4 * q.numel()  # of two splits, which a GPU takes by itself
        assert largest.bytes <= two_outputs, f"{options}: {largest.bytes} bytes were allocated"


def test_many_splits_of_few_keys(attention_forward, device):
    case = Case(1, 4, 2, 1, 70, 16, True)
    check(attention_forward, *make_qkv(case, device=device), causal=True, n_splits=7)  # most see nothing


def test_everything_at_once(attention_forward, device):
    case = Case(2, 4, 2, 90, 170, 40, True)
    q, k, v = make_qkv(case, device=device, scale=3.0)
    options = {"causal": True, "sm_scale": -0.4, "window": (60, None), "softcap": 5.0}
    options["sinks"] = torch.randn(4, device=device)
    options["key_padding_mask"] = torch.rand(2, 170, device=device) > 0.2
    heads = torch.arange(8).view(2, 4, 1, 1)
    kept = keep_mask(99, heads, torch.arange(90)[:, None], torch.arange(170), 0.25).to(device)
    output, lse = attention_forward(q, k, v, dropout_p=0.25, seed=99, **options)
    oracle, naive = references(q, k, v, dropout_p=0.25, dropout_mask=kept, **options)
    assert_right("output", output, oracle, naive)
    assert_right("lse", lse, oracle, naive)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["one query"]], ids=["self", "one query"])
def test_fp8(attention_forward, device, case, dtype):
    """Against float64 on the quantised inputs: what is left is bf16's rounding of weights and output."""
    q, k, v = (x.to(dtype) for x in make_qkv(case, device=device))
    descale = torch.tensor([0.7, 1.3], device=device)
    output, lse = attention_forward(q, k, v, causal=True, descale=descale)
    wide = [x.to(torch.float32) for x in (q, k, v)]
    oracle, _ = references(*wide, causal=True, sm_scale=0.7 / case.head_dim**0.5)
    assert output.dtype == torch.bfloat16
    allowed = 4 * torch.finfo(torch.bfloat16).eps * wide[2].abs().max().item()
    assert (output.double() - 1.3 * oracle.output).abs().max() < allowed
    torch.testing.assert_close(lse.double(), oracle.lse, rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@example(batch=2, group=3, n_q=70, n_k=90, head_dim=20, causal=True, left=80, right=None)
@given(
    batch=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    n_q=st.integers(1, 140),
    n_k=st.integers(1, 140),
    head_dim=st.sampled_from([3, 16, 20]),
    causal=st.booleans(),
    left=st.none() | st.integers(0, 150),
    right=st.none() | st.integers(0, 150),
)
def test_any_shape(request, batch, group, n_q, n_k, head_dim, causal, left, right):
    attention_forward, device = request.getfixturevalue("attention_forward"), request.getfixturevalue("device")
    case = Case(batch, 2 * group, 2, n_q, n_k, head_dim, causal)
    check(attention_forward, *make_qkv(case, device=device), causal=causal, window=(left, right))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences(attention_forward, causal):
    q, k, v = make_qkv(Case(1, 4, 2, 65536, 65536, 64, causal), torch.bfloat16, "cuda")
    output, lse = attention_forward(q, k, v, causal)
    for head in (0, 3):
        for rows in (slice(0, 64), slice(40000, 40064), slice(65472, 65536)):
            seen = rows.stop if causal else 65536
            part = (q[:, head : head + 1, rows], k[:, head // 2, None, :seen], v[:, head // 2, None, :seen])
            oracle, naive = references(*part, causal)
            assert_right("output", output[:, head : head + 1, rows], oracle, naive)
            assert_right("lse", lse[:, head : head + 1, rows], oracle, naive)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(attention_forward):
    q = torch.randn(1, 1, 1, 64, device="cuda", dtype=torch.float16).expand(9, 60, 65536, 64).contiguous()
    q[8, 59] = torch.randn(65536, 64, device="cuda").half()
    assert q.numel() > 2**31
    k, v = (torch.randn(9, 1, 128, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    output, lse = attention_forward(q, k, v)
    oracle, naive = references(q[8:, 59:], k[8:], v[8:])
    assert_right("output", output[8:, 59:], oracle, naive)
    assert_right("lse", lse[8:, 59:], oracle, naive)
