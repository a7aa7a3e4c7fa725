"""Cumulative scores: chunks add up to the whole, whatever the backend, and what is refused."""

import subprocess
import sys

import pytest
import torch
from helpers import Case, assert_right, make_qkv, references

from flash_attention_with_scores import (
    FlashAttentionWithAccumulation,
    attention,
    flash_attention_with_cumulative_scores,
)

WHOLE = Case(2, 4, 2, 20, 20, 16, True)
ENDS = (13, 14, 20)  # a prompt, a token, and one more chunk
OPTIONS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (6, 0)},
    "padding": {"causal": True, "key_padding_mask": torch.arange(20)[None].expand(2, -1) >= torch.tensor([[0], [5]])},
    "softcap and sinks": {"causal": True, "softcap": 3.0, "sinks": torch.tensor([0.0, 3.0, -torch.inf, 1.0])},
}


def chunks(q, k, v, options):
    """Yield the inputs of one call after another: new queries, all keys so far, their part of the padding mask."""
    for begin, stop in zip((0, *ENDS), ENDS, strict=False):
        own = dict(options)
        if "key_padding_mask" in own:
            own["key_padding_mask"] = own["key_padding_mask"][:, :stop]
        yield q[:, :, begin:stop], k[:, :, :stop], v[:, :, :stop], own


@pytest.mark.parametrize(("name", "backend"), [*((name, "pytorch") for name in OPTIONS), ("causal", "triton")])
def test_chunks_add_up_to_the_whole(device, name, backend):
    q, k, v = make_qkv(WHOLE, device=device)
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    oracle, naive = references(q, k, v, **options)
    outputs, scores = [], None
    for *inputs, own in chunks(q, k, v, options):
        output, scores = flash_attention_with_cumulative_scores(*inputs, scores, **own, backend=backend)
        outputs.append(output)
    assert_right("output", torch.cat(outputs, 2), oracle, naive, dtype=torch.float32)
    assert_right("softmax_col_sum", scores, oracle, naive, dtype=torch.float32, atol=1e-6)
    if name == "causal":  # two heads of a group, 20 queries
        torch.testing.assert_close(scores.sum(-1), torch.full_like(scores[..., 0], 2 * 20), rtol=1e-5, atol=0)


def test_module_with_a_growing_cache(device):
    q, k, v = make_qkv(WHOLE, device=device)
    module = FlashAttentionWithAccumulation()
    outputs = [module(*inputs, **own, backend="pytorch") for *inputs, own in chunks(q, k, v, {"causal": True})]
    oracle, naive = references(q, k, v, True)
    assert_right("output", torch.cat(outputs, 2), oracle, naive)
    assert_right("softmax_col_sum", module.get_cumulative_scores(), oracle, naive, atol=1e-6)


def test_module_with_cross_attention_and_scale(device):
    module = FlashAttentionWithAccumulation()
    k, v = make_qkv(Case(1, 2, 1, 5, 30, 16, False), device=device)[1:]
    queries = [torch.randn(1, 2, n, 16, device=device) for n in (5, 1, 3)]
    for q in queries:
        module(q, k, v, scale=0.7, backend="pytorch")
    oracle, naive = references(torch.cat(queries, 2), k, v, False, 0.7)
    assert_right("softmax_col_sum", module.get_cumulative_scores(), oracle, naive, atol=1e-6)


def test_scores_stay_as_they_are_and_carry_gradients(device):
    q, k, v = (x.requires_grad_() for x in make_qkv(Case(1, 2, 1, 4, 9, 8, True), torch.float64))
    given = torch.rand(1, 1, 6, dtype=torch.float64)
    before = given.clone()
    scores = flash_attention_with_cumulative_scores(q, k, v, given, causal=True)[1]
    assert torch.equal(given, before)
    assert torch.equal(scores[..., :6] - given, (scores - torch.nn.functional.pad(given, (0, 3)))[..., :6])
    weights = torch.arange(9.0, dtype=torch.float64)
    actual = torch.autograd.grad((scores * weights).sum(), (q, k))
    expected = torch.autograd.grad((references(q, k, v, True)[0].softmax_col_sum * weights).sum(), (q, k))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_module(device):
    q, k, v = make_qkv(Case(1, 2, 2, 6, 6, 16, True), device=device)
    calls = []

    class Original(torch.nn.Module):
        def forward(self, *inputs, **options):
            calls.append(options)
            return attention(*inputs, **options)

    module = FlashAttentionWithAccumulation(Original())
    assert module.get_cumulative_scores() is None
    expected = attention(q, k, v, True)
    torch.testing.assert_close(module(q, k, v, True), expected)
    kept = module.get_cumulative_scores()
    assert not calls
    assert not kept.requires_grad

    module.accumulate_scores = False
    assert torch.equal(module(q, k, v, True, window=(3, 0)), attention(q, k, v, True, window=(3, 0)))
    assert calls == [{"window": (3, 0)}]
    assert module.get_cumulative_scores() is kept
    assert torch.equal(FlashAttentionWithAccumulation(accumulate_scores=False)(q, k, v, True), expected)

    module.accumulate_scores = True
    module.reset_scores()
    assert module.get_cumulative_scores() is None
    flat = [x[:, 0] for x in (q, k, v)]
    torch.testing.assert_close(module(*flat, True), expected[:, 0])
    torch.testing.assert_close(module.get_cumulative_scores(), kept[:, :1])


def given(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (given(2, 2, 9), ValueError, r"cumulative_scores must have shape \[2, 2, n\] with n at most 8.*\[2, 2, 9\]"),
        (given(1, 2, 8), ValueError, r"cumulative_scores must have shape .*got \[1, 2, 8\]"),
        (given(2, 4, 8), ValueError, r"cumulative_scores must have shape .*got \[2, 4, 8\]"),
        (given(2, 2), ValueError, r"cumulative_scores must have shape .*got \[2, 2\]"),
        (given(2, 2, 8, dtype=torch.float16), TypeError, "cumulative_scores must be torch.float32, got torch.float16"),
        (given(2, 2, 8, device="meta"), ValueError, "cumulative_scores must be on q's device cpu, got meta"),
        ([0.0], TypeError, "cumulative_scores must be a torch.Tensor or None, got list"),
    ],
)
def test_wrong_scores_are_refused(scores, error, message):
    q, k, v = make_qkv(Case(2, 4, 2, 3, 8, 16, True))
    with pytest.raises(error, match=message):
        flash_attention_with_cumulative_scores(q, k, v, scores)


def test_a_new_sequence_needs_a_reset():
    module = FlashAttentionWithAccumulation()
    module(*make_qkv(Case(2, 2, 2, 3, 8, 16, True)))
    for case in (Case(1, 2, 2, 3, 8, 16, True), Case(2, 2, 2, 3, 7, 16, True)):
        with pytest.raises(ValueError, match=r"got \[2, 2, 8\]; call reset_scores\(\) before a new sequence"):
            module(*make_qkv(case))
    for wrong in ({"original_attention": 3}, {"accumulate_scores": 1}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            FlashAttentionWithAccumulation(**wrong)


def test_the_library_does_not_need_transformers():
    code = "import sys, flash_attention_with_scores as f; assert 'transformers' not in sys.modules; f.no_such_name"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no attribute 'no_such_name'" in run.stderr, run.stderr


def test_fp8_is_refused(device):
    q, k, v = (torch.randn(1, 2, 6, 16, device=device).to(torch.float8_e4m3fn) for _ in range(3))
    for scores in (None, torch.zeros(1, 2, 6, device=device)):
        with pytest.raises(TypeError, match=r"q must be fp16, bf16, fp32 or fp64, got torch\.float8_e4m3fn"):
            flash_attention_with_cumulative_scores(q, k, v, cumulative_scores=scores)
