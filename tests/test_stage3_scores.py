"""Stage 3, first slice: the scores out of the one forward loop."""

import pytest
import torch
from helpers import CASES, HALF, Case, assert_right, make_qkv, references

SELF = Case(2, 4, 2, 70, 70, 32, True)
CACHE = Case(1, 4, 2, 21, 90, 16, True)


@pytest.fixture
def launch(graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return graded("stage3_scores_and_sums", "launch")


def check(launch, q, k, v, *args):
    output, scores = launch.attention_with_scores(q, k, v, *args)
    oracle, naive = references(q, k, v, *args)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    assert_right("scores", scores, oracle, naive, dtype=q.dtype)
    alone = launch.compute_attention_scores(q, k, *args)
    assert_right("scores", alone, oracle, naive, dtype=q.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(launch, device, case):
    check(launch, *make_qkv(case, device=device), case.causal)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SELF, CACHE, CASES[-1]], ids=str)
def test_half_precision(launch, device, dtype, case):
    check(launch, *make_qkv(case, dtype, device), case.causal)


def test_scale(launch, device):
    check(launch, *make_qkv(SELF, device=device), True, -0.3)


def test_any_strides(launch, device):
    packed = torch.randn(2, 70, 3, 4, 20, device=device)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    check(launch, q, k[:, :1].expand(-1, 4, -1, -1), v, True)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_scores_are_exactly_zero(launch, device, causal):
    q, k, v = make_qkv(CACHE, device=device)
    _, scores = launch.attention_with_scores(q, k, v, causal)
    visible = torch.ones(21, 90, dtype=torch.bool)
    if causal:
        visible = visible.tril(90 - 21)
    assert ((scores.cpu() != 0) == visible).all()


def test_dropout_leaves_the_scores_alone(launch, device):
    q, k, v = make_qkv(SELF, device=device)
    output, scores = launch.attention_with_scores(q, k, v, True)
    dropped, same_scores = launch.attention_with_scores(q, k, v, True, dropout_p=0.5, seed=7)
    assert torch.equal(scores, same_scores)
    assert not torch.allclose(output, dropped)


def test_scores_give_the_output_back(launch, device):
    q, k, v = make_qkv(SELF, torch.float32, device)
    output, scores = launch.attention_with_scores(q, k, v, False)
    torch.testing.assert_close(scores.softmax(-1) @ v.repeat_interleave(2, 1), output, rtol=1e-5, atol=1e-5)


def test_same_bits_twice(launch, device):
    q, k, v = make_qkv(SELF, device=device)
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
