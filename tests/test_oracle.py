"""The oracle itself: against PyTorch's own attention, and against sums written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, make_qkv

from stage1_pytorch_tiled.dense import naive_attention


@pytest.mark.parametrize("case", [c for c in CASES if c.n_q <= c.n_k], ids=str)
def test_output_equals_torch(case):
    q, k, v = make_qkv(case, torch.float64)
    mask = torch.ones(case.n_q, case.n_k, dtype=torch.bool)
    if case.causal:
        mask = mask.tril(case.n_k - case.n_q)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(naive_attention(q, k, v, case.causal).output, expected)


def test_every_statistic_by_hand():
    """Two query heads share one key head; queries see keys 0..1 and 0..2; D = 1, so a score is a product."""
    q = torch.tensor([[1.0, 2.0], [-1.0, 0.5]]).view(1, 2, 2, 1).double()
    k = torch.tensor([1.0, 3.0, -2.0]).view(1, 1, 3, 1).double()
    v = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3, 1).double()
    result = naive_attention(q, k, v, True, sm_scale=0.5, split=1)

    scores = [[[0.5, 1.5, 0.0], [1.0, 3.0, -2.0]], [[-0.5, -1.5, 0.0], [0.25, 0.75, -0.5]]]
    weights = [
        [
            [math.exp(s) / sum(math.exp(t) for t in row[:n]) for s in row[:n]] + [0.0] * (3 - n)
            for row, n in zip(head, (2, 3), strict=True)
        ]
        for head in scores
    ]
    scores, weights = torch.tensor([scores]).double(), torch.tensor([weights]).double()
    torch.testing.assert_close(result.scores, scores)
    torch.testing.assert_close(result.weights, weights)
    torch.testing.assert_close(result.output, (weights * torch.tensor([1.0, 10.0, 100.0])).sum(-1, keepdim=True))
    torch.testing.assert_close(result.row_sum, torch.tensor([[[2.0, 2.0], [-2.0, 0.5]]]).double())
    torch.testing.assert_close(result.col_sum, torch.tensor([[[1.25, 3.75, -2.5]]]).double())
    torch.testing.assert_close(result.total_attention, weights.sum(2))
    torch.testing.assert_close(result.softmax_col_sum, weights.sum((1, 2))[:, None])
    entropy = [[[sum(-p * math.log(p) for p in row if p > 0) for row in head] for head in weights[0].tolist()]]
    torch.testing.assert_close(result.entropy, torch.tensor(entropy).double())
    torch.testing.assert_close(result.max_weight, weights.max(-1).values)
    distance = torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]).double()  # query i stands at key i + 1
    torch.testing.assert_close(result.mean_distance, (weights * distance).sum(-1))
    torch.testing.assert_close(result.cross_token_qk_sum, torch.tensor([[[1.25]]]).double())
    torch.testing.assert_close(result.cross_token_softmax_sum, weights[:, :, 1, :1].sum(1, keepdim=True))


def test_lse_is_the_log_of_the_normaliser():
    q, k, v = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64)
    result = naive_attention(q, k, v, True)
    weights = torch.exp(result.scores - result.lse[..., None]).tril()
    torch.testing.assert_close(weights, result.weights)


@pytest.mark.parametrize(
    ("causal", "window", "visible"),
    [
        (False, None, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (True, None, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        (False, 1, [[0, 1, 1, 1], [0, 0, 1, 1]]),
        (True, 1, [[0, 1, 1, 0], [0, 0, 1, 1]]),
        (False, (None, 0), [[1, 1, 1, 0], [1, 1, 1, 1]]),
        (False, (0, None), [[0, 0, 1, 1], [0, 0, 0, 1]]),
    ],
)
def test_who_sees_whom(causal, window, visible):
    q, k = torch.ones(1, 1, 2, 1), torch.ones(1, 1, 4, 1)
    result = naive_attention(q, k, k, causal, window=window)
    assert (result.scores[0, 0] != 0).int().tolist() == visible
    assert (result.weights[0, 0] != 0).int().tolist() == visible


def test_sink_takes_its_share():
    q, k, v = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64)
    result = naive_attention(q, k, v, sinks=torch.tensor([2.0]).double())
    with_sink = torch.cat([result.scores, torch.full((1, 1, 5, 1), 2.0).double()], -1).softmax(-1)[..., :5]
    torch.testing.assert_close(result.weights, with_sink)
    assert (result.weights.sum(-1) < 1).all()
    torch.testing.assert_close(result.entropy, -(with_sink * with_sink.log()).sum(-1))
    torch.testing.assert_close(result.max_weight, with_sink.amax(-1))


@pytest.mark.parametrize("sink", [0.0, math.log(2.0), -math.inf])
def test_row_statistics_of_uniform_weights(sink):
    """The two queries stand at keys 2 and 3; they see 4 keys of weight 1 each, and a sink of weight e^sink."""
    q, k = torch.zeros(1, 1, 2, 4).double(), torch.randn(1, 1, 4, 4).double()
    result = naive_attention(q, k, k, sinks=torch.tensor([sink]).double())
    p = 1 / (4 + math.exp(sink))
    torch.testing.assert_close(result.entropy, torch.full((1, 1, 2), -4 * p * math.log(p)).double())
    torch.testing.assert_close(result.max_weight, torch.full((1, 1, 2), p).double())
    torch.testing.assert_close(
        result.mean_distance, torch.tensor([[[(2 + 1 + 0 + 1) / 4, (3 + 2 + 1 + 0) / 4]]]).double()
    )


def test_row_statistics_of_a_single_key():
    q, k = 100 * torch.ones(1, 1, 1, 1), torch.tensor([1.0, 1.0, 9.0, 1.0]).view(1, 1, 4, 1)
    result = naive_attention(q, k, k)
    assert (result.entropy.item(), result.max_weight.item(), result.mean_distance.item()) == (0, 1, 1)


def test_softcap_bounds_the_logits():
    q, k, v = 100 * torch.randn(3, 1, 1, 5, 4, dtype=torch.float64)
    result = naive_attention(q, k, v, softcap=2.0)
    torch.testing.assert_close(result.weights, (2 * torch.tanh(result.scores / 2)).softmax(-1))


def test_padding_and_rows_that_see_nothing():
    q, k, v = torch.randn(3, 2, 1, 5, 4)
    mask = torch.tensor([[False] * 2 + [True] * 3, [True] * 5])
    result = naive_attention(q, k, v, True, key_padding_mask=mask)
    torch.testing.assert_close(result.output[0, 0, :2], torch.zeros(2, 4))
    torch.testing.assert_close(result.lse[0, 0, :2], torch.full((2,), -math.inf))
    torch.testing.assert_close(result.softmax_col_sum[0, 0, :2], torch.zeros(2))
    for name in ("entropy", "max_weight", "mean_distance"):
        torch.testing.assert_close(getattr(result, name)[0, 0, :2], torch.zeros(2))
    alone = naive_attention(q[:1, :, 2:], k[:1, :, 2:], v[:1, :, 2:], True)
    torch.testing.assert_close(result.output[:1, :, 2:], alone.output)


def test_dropout_touches_the_output_alone():
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    mask = torch.rand(1, 2, 6, 6) > 0.5
    plain, dropped = naive_attention(q, k, v), naive_attention(q, k, v, dropout_p=0.5, dropout_mask=mask)
    torch.testing.assert_close(dropped.output, (plain.weights * mask * 2) @ v)
    for name in ("lse", "scores", "weights", "row_sum", "col_sum", "softmax_col_sum"):
        torch.testing.assert_close(getattr(dropped, name), getattr(plain, name))


@pytest.mark.parametrize("split", [0, 3, 6])
def test_cross_token_sums_cut_the_matrix_in_two(split):
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    result = naive_attention(q, k, v, True, split=split)
    assert result.cross_token_qk_sum.shape == (1, 2, split)
    before = naive_attention(q[:, :, :split], k[:, :, :split], v[:, :, :split], True)
    together = before.softmax_col_sum + result.cross_token_softmax_sum
    torch.testing.assert_close(together, result.softmax_col_sum[..., :split])


def test_three_dimensional_inputs():
    q, k, v = torch.randn(3, 2, 5, 4)
    flat, deep = (
        naive_attention(q, k, v, True, split=2),
        naive_attention(q[:, None], k[:, None], v[:, None], True, split=2),
    )
    for a, b in zip(flat, deep, strict=True):
        torch.testing.assert_close(a, b.squeeze(1))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_empty_tensors(shape):
    batch, heads, n_q, n_k = shape
    result = naive_attention(torch.randn(batch, heads, n_q, 4), *torch.randn(2, batch, heads, n_k, 4).unbind(0))
    torch.testing.assert_close(result.output, torch.zeros(batch, heads, n_q, 4))
    torch.testing.assert_close(result.lse, torch.full((batch, heads, n_q), -math.inf))
    torch.testing.assert_close(result.softmax_col_sum, torch.zeros(batch, heads, n_k))
    for name in ("entropy", "max_weight", "mean_distance"):
        torch.testing.assert_close(getattr(result, name), torch.zeros(batch, heads, n_q))
