"""Stage 1: softmax in three passes, in two, and in mergeable blocks."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st


@pytest.fixture
def online_softmax(graded):
    return graded("stage1_pytorch_tiled", "online_softmax")


def state_of(logits, v):
    """Return (row_max, row_sum, acc) of a block, straight from the definitions."""
    row_max = logits.amax(-1)
    weights = torch.exp(logits - row_max.masked_fill(row_max == -math.inf, 0)[..., None])
    return row_max, weights.sum(-1), weights @ v


@pytest.mark.parametrize("function", ["softmax_three_pass", "softmax_two_pass"])
@pytest.mark.parametrize("n_k", [1, 2, 15, 64])
def test_softmax_equals_torch(online_softmax, function, n_k):
    logits = torch.randn(3, 5, n_k, dtype=torch.float64)
    actual = getattr(online_softmax, function)(logits)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, logits.softmax(-1))


@pytest.mark.parametrize("function", ["softmax_three_pass", "softmax_two_pass"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_softmax_survives_large_logits(online_softmax, function, offset):
    logits = torch.randn(4, 9, dtype=torch.float64)
    actual = getattr(online_softmax, function)(logits + offset)
    torch.testing.assert_close(actual, logits.softmax(-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("function", ["softmax_three_pass", "softmax_two_pass"])
def test_softmax_of_masked_positions(online_softmax, function):
    logits = torch.randn(3, 6)
    logits[0, :4] = -math.inf  # the first keys masked: the max so far is -inf for a while
    logits[1] = -math.inf  # no key at all
    actual = getattr(online_softmax, function)(logits)
    torch.testing.assert_close(actual[[0, 2]], logits[[0, 2]].softmax(-1))
    torch.testing.assert_close(actual[1], torch.zeros(6))


@pytest.mark.parametrize("function", ["softmax_three_pass", "softmax_two_pass"])
def test_softmax_when_the_max_keeps_growing(online_softmax, function):
    logits = torch.arange(0, 200, 10, dtype=torch.float64)[None]
    torch.testing.assert_close(getattr(online_softmax, function)(logits), logits.softmax(-1))


def test_empty_state_is_neutral(online_softmax):
    part = online_softmax.SoftmaxState(*state_of(torch.randn(2, 5, 7), torch.randn(2, 7, 3)))
    nothing = online_softmax.empty_state((2, 5), 3, like=part.acc)
    for merged in (online_softmax.merge(part, nothing), online_softmax.merge(nothing, part)):
        torch.testing.assert_close(tuple(merged), tuple(part))
    both_empty = online_softmax.merge(nothing, nothing)
    torch.testing.assert_close(tuple(both_empty), tuple(nothing))


@pytest.mark.parametrize("far_apart", [0.0, 300.0, -300.0])
def test_merge_equals_the_whole(online_softmax, far_apart):
    logits, v = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    logits[..., 5:] += far_apart
    a = online_softmax.SoftmaxState(*state_of(logits[..., :5], v[:, :5]))
    b = online_softmax.SoftmaxState(*state_of(logits[..., 5:], v[:, 5:]))
    whole = state_of(logits, v)
    torch.testing.assert_close(tuple(online_softmax.merge(a, b)), whole)
    torch.testing.assert_close(tuple(online_softmax.merge(b, a)), whole)


def test_merge_is_associative(online_softmax):
    parts = [
        online_softmax.SoftmaxState(*state_of(torch.randn(4, n, dtype=torch.float64) * 10, torch.randn(n, 2).double()))
        for n in (3, 1, 8)
    ]
    a, b, c = parts
    left = online_softmax.merge(online_softmax.merge(a, b), c)
    right = online_softmax.merge(a, online_softmax.merge(b, c))
    torch.testing.assert_close(tuple(left), tuple(right))


def test_step_equals_merge_with_a_block(online_softmax):
    logits, v = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    before = state_of(torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64))
    before = online_softmax.SoftmaxState(*before)
    block = online_softmax.SoftmaxState(*state_of(logits, v))
    actual = online_softmax.online_softmax_step(before, logits, v)
    torch.testing.assert_close(tuple(actual), tuple(online_softmax.merge(before, block)))


def test_step_of_rows_that_saw_nothing(online_softmax):
    nothing = online_softmax.empty_state((2,), 3, like=torch.zeros(1))
    masked = torch.full((2, 4), -math.inf)
    state = online_softmax.online_softmax_step(nothing, masked, torch.randn(4, 3))
    torch.testing.assert_close(tuple(state), tuple(nothing))


def test_dropout_factor_spares_the_normaliser(online_softmax):
    logits, v = torch.randn(5, 7), torch.randn(7, 3)
    nothing = online_softmax.empty_state((5,), 3, like=v)
    factor = torch.randint(0, 2, (5, 7)) * 2.0
    plain = online_softmax.online_softmax_step(nothing, logits, v)
    dropped = online_softmax.online_softmax_step(nothing, logits, v, factor)
    torch.testing.assert_close(dropped.row_sum, plain.row_sum)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    torch.testing.assert_close(dropped.acc, (weights * factor) @ v)


def test_finish(online_softmax):
    logits, v = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    output, lse = online_softmax.finish(online_softmax.SoftmaxState(*state_of(logits, v)))
    torch.testing.assert_close(output, logits.softmax(-1) @ v)
    torch.testing.assert_close(lse, logits.logsumexp(-1))


def test_finish_rows_that_saw_nothing(online_softmax):
    output, lse = online_softmax.finish(online_softmax.empty_state((4,), 3, like=torch.zeros(1)))
    torch.testing.assert_close(output, torch.zeros(4, 3))
    torch.testing.assert_close(lse, torch.full((4,), -math.inf))


def test_finish_with_a_sink(online_softmax):
    logits, v, sink = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64), torch.tensor(1.5)
    output, lse = online_softmax.finish(online_softmax.SoftmaxState(*state_of(logits, v)), sink.double())
    with_sink = torch.cat([logits, sink.double().expand(5, 1)], dim=1)
    torch.testing.assert_close(output, with_sink.softmax(-1)[:, :7] @ v)
    torch.testing.assert_close(lse, with_sink.logsumexp(-1))


@settings(max_examples=30)
@example([3, 1, 4], 1.0, 0)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0.1, 100), st.integers(0, 2**31))
def test_any_blocking_gives_the_softmax(request, block_sizes, magnitude, seed):
    online_softmax = request.getfixturevalue("online_softmax")
    generator = torch.Generator().manual_seed(seed)
    n_k = sum(block_sizes)
    logits = torch.randn(3, n_k, dtype=torch.float64, generator=generator) * magnitude
    v = torch.randn(n_k, 2, dtype=torch.float64, generator=generator)
    state = online_softmax.empty_state((3,), 2, like=v)
    start = 0
    for size in block_sizes:
        state = online_softmax.online_softmax_step(state, logits[:, start : start + size], v[start : start + size])
        start += size
    output, lse = online_softmax.finish(state)
    torch.testing.assert_close(output, logits.softmax(-1) @ v)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
