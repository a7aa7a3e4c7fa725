"""Stage 3: the scores out of the one forward loop."""

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, flat, make_qkv, references
from test_stage2_features import FEATURES, options_of

from stage1_pytorch_tiled.dense import visible_keys

SELF = Case(2, 4, 2, 40, 70, 32, True)
CACHE = Case(1, 4, 2, 21, 90, 16, True)
EMPTY_ROWS = Case(2, 2, 1, 60, 20, 16, True)
PATHS = {"pointers": 90, "descriptor": 92}  # rows of 92 fp32 elements are a multiple of 16 bytes long, rows of 90 not


@pytest.fixture
def launch(graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return flat(graded("stage3_scores_and_sums", "launch"))


def check(launch, q, k, v, *args, **options):
    output, lse, scores = launch.attention_with_scores(q, k, v, *args, **options)
    oracle, naive = references(q, k, v, *args, **options)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)
    assert_right("scores", scores, oracle, naive, dtype=q.dtype)
    return oracle, naive


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(launch, device, case):
    check(launch, *make_qkv(case, device=device), case.causal)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SELF, CACHE], ids=str)
def test_half_precision(launch, device, dtype, case):
    check(launch, *make_qkv(case, dtype, device), case.causal)


@pytest.mark.parametrize("n_k", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", ["causal window", "right window", "softcap", "sinks", "padding", "negative scale"])
def test_features(launch, device, name, n_k):
    case = Case(2, 1, 1, 21, n_k, 16, True)
    options = options_of(FEATURES[name], case, device)
    q, k, v = make_qkv(case, device=device)
    oracle, naive = check(launch, q, k, v, **options)
    options = {argument: x for argument, x in options.items() if argument not in ("softcap", "sinks")}
    alone = launch.compute_attention_scores(q, k, **options)
    assert_right("scores", alone, oracle, naive, dtype=q.dtype)


@pytest.mark.parametrize("n_k", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("region", [(0, 20), (1, None), (13, 24), (13, None), (20, 77), (3, 64)], ids=str)
def test_region(launch, device, region, n_k):
    q, k, v = make_qkv(CACHE._replace(n_k=n_k), device=device)
    q_begin, k_stop = region[0], n_k if region[1] is None else region[1]
    for options in ({}, {"window": (30, None)}):
        output, _, scores = launch.attention_with_scores(q, k, v, True, q_begin=q_begin, k_stop=region[1], **options)
        oracle, naive = (
            result._replace(scores=result.scores[:, :, q_begin:, :k_stop])
            for result in references(q, k, v, True, **options)
        )
        assert_right("output", output, oracle, naive)
        assert_right("scores", scores, oracle, naive, dtype=q.dtype)
    *_, past_the_last_query = launch.attention_with_scores(q, k, v, True, q_begin=CACHE.n_q + 3, k_stop=5)
    assert past_the_last_query.shape == (CACHE.batch, CACHE.n_heads, 0, 5)


def test_any_strides(launch, device):
    packed = torch.randn(2, 70, 3, 2, 20, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    check(launch, q, k[:, :1].expand(-1, 2, -1, -1), v, True)


@pytest.mark.parametrize("n_k", [92, 200, 201])
@pytest.mark.parametrize("name", ["full", "causal window", "diagonal"])
def test_masked_scores_are_exactly_zero(launch, device, n_k, name):
    """Keys on both sides of the tiles that are visited: a row without its zeros would hold NaN."""
    n_q = 80
    q, k, _ = make_qkv(Case(1, 1, 1, n_q, n_k, 16, True), device=device)
    options = {"causal": False, "window": None} | FEATURES[name]
    scores = launch.compute_attention_scores(q, k, **options)
    visible = visible_keys(n_q, n_k, **options, key_padding_mask=None, device="cpu")
    assert torch.equal(scores.cpu() != 0, visible)


def test_rows_that_see_nothing_score_zero(launch, device):
    q, k, v = make_qkv(EMPTY_ROWS, device=device)
    output, lse, scores = launch.attention_with_scores(q, k, v, True)
    assert torch.equal(lse[:, :, :40].cpu(), torch.full((2, 2, 40), -torch.inf))
    assert not scores[:, :, :40].any()
    assert not output[:, :, :40].any()
    assert scores[:, :, 40:, 0].all()


def test_dropout_leaves_the_scores_alone(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    output, lse, scores = launch.attention_with_scores(q, k, v, True)
    dropped, same_lse, same_scores = launch.attention_with_scores(q, k, v, True, dropout_p=0.5, seed=7)
    assert torch.equal(scores, same_scores)
    assert torch.equal(lse, same_lse)
    assert not torch.allclose(output, dropped)


def test_scores_give_the_output_back(launch, device):
    q, k, v = make_qkv(SELF, device=device)
    output, _, scores = launch.attention_with_scores(q, k, v, False)
    torch.testing.assert_close(scores.softmax(-1) @ v.repeat_interleave(2, 1), output, rtol=1e-5, atol=1e-5)


def test_writes_where_it_is_told_to(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    room = {"scores": q.new_empty(1, 4, 21, 90), "out": torch.empty_like(q), "lse": q.new_empty(1, 4, 21)}
    output, lse, scores = launch.attention_with_scores(q, k, v, True, **room)
    assert output is room["out"]
    assert lse is room["lse"]
    assert scores is room["scores"]
    oracle, naive = references(q, k, v, True)
    assert_right("scores", scores, oracle, naive)


def test_same_bits_twice(launch, device):
    q, k, v = make_qkv(CACHE, device=device)
    for first, second in zip(
        launch.attention_with_scores(q, k, v, True), launch.attention_with_scores(q, k, v, True), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(launch):
    q, k = torch.randn(1, 9, 16384, 16, device="cuda").half(), torch.randn(1, 1, 16384, 16, device="cuda").half()
    scores = launch.compute_attention_scores(q, k)
    assert scores.numel() > 2**31
    for head in (0, 8):
        rows = q[0, head, -64:].float() @ k[0, 0].float().T / 4
        torch.testing.assert_close(scores[0, head, -64:].float(), rows, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [16384, 32767, 32768])  # the odd one goes through pointers
def test_long_sequences(launch, n):
    q, k, v = make_qkv(Case(1, 2, 1, n, n, 32, True), torch.float16, "cuda")
    output, _, scores = launch.attention_with_scores(q, k, v, True)
    alone = launch.compute_attention_scores(q, k, True)
    for rows in (slice(0, 64), slice(n // 2, n // 2 + 64), slice(n - 64, n)):
        for head in (0, 1):
            part = (q[:, head : head + 1, rows], k[:, :, : rows.stop], v[:, :, : rows.stop])
            oracle, naive = references(*part, True)
            assert_right("output", output[:, head : head + 1, rows], oracle, naive)
            for x in (scores, alone):
                assert_right("scores", x[:, head : head + 1, rows, : rows.stop], oracle, naive)
                assert not x[:, head, rows, rows.stop :].any()
