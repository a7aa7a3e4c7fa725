"""Stage 1: scores and sums from the same loop, by hooks and a second pass."""

import pytest
import torch
from helpers import CASES, Case, assert_right, make_qkv, references

CACHE = Case(2, 4, 2, 33, 50, 16, True)
HOOKS = {"scores": "StoreScores", "row_sum": "AddRowSum", "col_sum": "AddColSum"}


@pytest.fixture
def hooks(graded):
    return graded("stage1_pytorch_tiled", "hooks")


@pytest.fixture
def tiled_forward(graded):
    return graded("stage1_pytorch_tiled", "tiled_forward")


def hooked(hooks, tiled_forward, name, q, k, v, causal, **kwargs):
    hook = getattr(hooks, HOOKS[name])(q, k)
    tiled_forward.tiled_attention(q, k, v, causal, on_logits=hook, **kwargs)
    return getattr(hook, name)


def softmax_col_sum(tiled_forward, q, k, v, causal, **kwargs):
    _, lse = tiled_forward.tiled_attention(q, k, v, causal, **kwargs)
    kwargs.pop("sinks", None)  # the sink is in the lse
    return tiled_forward.tiled_softmax_col_sum(q, k, lse, causal, **kwargs)


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hooks_match_oracle(hooks, tiled_forward, name, case):
    q, k, v = make_qkv(case)
    oracle, naive = references(q, k, v, case.causal)
    assert_right(name, hooked(hooks, tiled_forward, name, q, k, v, case.causal), oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_in_every_dtype(hooks, tiled_forward, name, dtype):
    q, k, v = make_qkv(CACHE, dtype)
    oracle, naive = references(q, k, v, True)
    promised = dtype if name == "scores" or dtype == torch.float64 else torch.float32
    assert_right(name, hooked(hooks, tiled_forward, name, q, k, v, True), oracle, naive, dtype=promised)


@pytest.mark.parametrize("options", [{"window": 6}, {"softcap": 2.0}, {"padding": True}], ids=str)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_with_masks(hooks, tiled_forward, name, options):
    q, k, v = make_qkv(CACHE)
    options = dict(options)
    if options.pop("padding", False):
        options["key_padding_mask"] = torch.rand(2, 50) > 0.4
    oracle, naive = references(q, k, v, True, **options)
    assert_right(name, hooked(hooks, tiled_forward, name, q, k, v, True, **options), oracle, naive)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_softmax_col_sum_matches_oracle(tiled_forward, case):
    q, k, v = make_qkv(case)
    oracle, naive = references(q, k, v, case.causal)
    actual = softmax_col_sum(tiled_forward, q, k, v, case.causal)
    assert_right("softmax_col_sum", actual, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize("options", [{"window": 6}, {"softcap": 2.0}, {"sinks": True}, {"padding": True}], ids=str)
def test_softmax_col_sum_with_masks(tiled_forward, options):
    q, k, v = make_qkv(CACHE)
    options = dict(options)
    if options.pop("padding", False):
        options["key_padding_mask"] = torch.rand(2, 50) > 0.4
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(4)
    oracle, naive = references(q, k, v, True, **options)
    actual = softmax_col_sum(tiled_forward, q, k, v, True, **options)
    assert_right("softmax_col_sum", actual, oracle, naive)


@pytest.mark.parametrize("n_q", [20, 50, 70])
def test_softmax_col_sums_add_up_to_the_rows_that_see_a_key(tiled_forward, n_q):
    q, k, v = make_qkv(Case(1, 4, 2, n_q, 50, 16, True))
    actual = softmax_col_sum(tiled_forward, q, k, v, True)
    rows = 2 * min(n_q, 50)  # two query heads a key head; rows before the first key see nothing
    torch.testing.assert_close(actual.sum(-1), torch.full((1, 2), float(rows)))


def test_raw_sums_are_linear_in_q(hooks, tiled_forward):
    q, k, v = make_qkv(CACHE, torch.float64)
    p, _, _ = make_qkv(CACHE, torch.float64)
    for name in ("row_sum", "col_sum"):
        of_q, of_p, of_both = (hooked(hooks, tiled_forward, name, x, k, v, True) for x in (q, p, 2 * q - 3 * p))
        torch.testing.assert_close(of_both, 2 * of_q - 3 * of_p)


def test_permuting_keys_permutes_columns(hooks, tiled_forward):
    q, k, v = make_qkv(CACHE, torch.float64)
    order = torch.randperm(50)
    for column_sum in (
        lambda k, v: hooked(hooks, tiled_forward, "col_sum", q, k, v, False),
        lambda k, v: softmax_col_sum(tiled_forward, q, k, v, False),
    ):
        torch.testing.assert_close(column_sum(k[:, :, order], v[:, :, order]), column_sum(k, v)[..., order])


def test_three_dimensional_softmax_col_sum(tiled_forward):
    q, k, v = torch.randn(2, 20, 16), torch.randn(2, 30, 16), torch.randn(2, 30, 16)
    oracle, naive = references(q, k, v, True)
    assert_right("softmax_col_sum", softmax_col_sum(tiled_forward, q, k, v, True), oracle, naive)
