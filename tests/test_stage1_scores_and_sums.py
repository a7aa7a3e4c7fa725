"""Stage 1: scores and sums from the same loop, by hooks and a second pass."""

import pytest
import torch
from helpers import CASES, Case, assert_right, flat, make_qkv, references

CACHE = Case(2, 4, 2, 33, 50, 16, True)
HOOKS = {"scores": "StoreScores", "row_sum": "AddRowSum", "col_sum": "AddColSum"}


@pytest.fixture
def hooks(graded):
    return graded("stage1_pytorch_tiled", "hooks")


@pytest.fixture
def tiled_forward(graded):
    return flat(graded("stage1_pytorch_tiled", "tiled_forward"))


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


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 2.0}, {"padding": True}], ids=str)
@pytest.mark.parametrize("split", [0, 1, 16, 21, 33])
@pytest.mark.parametrize("n", [(33, 50), (50, 50), (50, 33)], ids=str)
def test_hooks_col_sum_across_a_split(hooks, tiled_forward, n, split, options):
    q, k, v = make_qkv(Case(2, 4, 2, *n, 16, True))
    options = dict(options)
    if options.pop("padding", False):
        options["key_padding_mask"] = torch.rand(2, n[1]) > 0.4
    oracle, naive = references(q, k, v, True, split=split, **options)
    hook = hooks.AddColSum(q, k, q_begin=split, k_stop=split)
    tiled_forward.tiled_attention(q, k, v, True, on_logits=hook, **options)
    assert_right("cross_token_qk_sum", hook.col_sum, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize("tiles", [(1, 1), (7, 5), (64, 64)], ids=str)
@pytest.mark.parametrize("region", [(20, 50), (0, 17), (32, 3), (33, 50), (5, 0)], ids=str)
def test_hooks_col_sum_of_a_region(hooks, tiled_forward, region, tiles):
    q, k, v = make_qkv(CACHE, torch.float64)
    q_begin, k_stop = region
    hook = hooks.AddColSum(q, k, q_begin, k_stop)
    tiled_forward.tiled_attention(q, k, v, True, on_logits=hook, block_m=tiles[0], block_n=tiles[1])
    oracle, _ = references(q, k, v, True)
    expected = oracle.scores[:, :, q_begin:, :k_stop].sum(-2).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(hook.col_sum, expected)


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
