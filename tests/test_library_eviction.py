"""Eviction on transformers' models: exactly as if all were kept and the evicted masked; and what is refused."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from eviction_oracle import DEVICE, NeverEvict, make_model
from huggingface_models import VOCABULARY
from transformers import LlamaConfig, LlavaConfig
from transformers.cache_utils import DynamicCache

from flash_attention_with_scores.eviction import (
    CAB,
    H2O,
    EvictingCache,
    EvictingLayer,
    Full,
    Random,
    SnapKV,
    StreamingLLM,
)
from flash_attention_with_scores.huggingface import NAME, replace_attention_with_flash, restore_attention

ATOL = 5e-5  # of logits of magnitude 5, in float32
POLICIES = {
    "H2O": H2O,
    "CAB": CAB,
    "SnapKV": lambda: SnapKV(window=4, kernel=3),
    "StreamingLLM": lambda: StreamingLLM(sinks=2),
    "Random": Random,
}
TURNS = (17, 1, 1, 5, 1, 3)  # tokens in each pass
N_TOKENS = sum(TURNS)


def tokens(batch=2, n=N_TOKENS):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY.start, VOCABULARY.stop, (batch, n), generator=generator).to(DEVICE)


def left_padding(batch=2, n=N_TOKENS):
    return torch.arange(n, device=DEVICE) >= 9 * torch.arange(batch, device=DEVICE)[:, None]


def ragged_turns():
    """Padding in front of the first turn, and at the end of a later one."""
    mask = left_padding()
    mask[0, 22:24] = False
    return mask


@torch.no_grad()
def run(model, cache, ids, mask=None, turns=TURNS):
    """Run the model turn by turn, without position_ids, and return the logits of all tokens."""
    logits, stop = [], 0
    for n in turns:
        start, stop = stop, stop + n
        masked = {} if mask is None else {"attention_mask": mask[:, :stop].long()}
        logits.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **masked).logits)
    return torch.cat(logits, 1)


def evicting_layers(cache):
    return {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, EvictingLayer)}


def assert_same_as_never_evicting(name, make_policy, budgets, mask=None, every=1, given=None):
    model, ids = make_model(name), tokens()
    oracle = NeverEvict(model, make_policy(), budgets, every)
    expected = run(model, oracle.cache, ids, mask)
    replace_attention_with_flash(model)
    cache = EvictingCache(model, make_policy(), budgets if given is None else given, every=every)
    actual = run(model, cache, ids, mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(actual[real], expected[real], atol=ATOL, rtol=0)
    layers = evicting_layers(cache)
    assert layers.keys() == oracle.left.keys()
    for i, layer in layers.items():
        n_kept = layer.keys.shape[2]
        assert layer.keys.shape[:3] == layer.values.shape[:3] == layer.positions.shape
        positions = oracle.left[i].nonzero()[:, -1].view(*layer.positions.shape[:2], -1)
        assert positions.shape[2] == n_kept < N_TOKENS
        is_real = real[:, None].expand_as(oracle.left[i]).gather(-1, positions)
        assert torch.equal(layer.positions, positions.where(is_real, -1))
        assert layer.get_seq_length() == N_TOKENS
        if layer.policy.uses_scores:
            expected_scores = oracle.scores[i].gather(-1, positions).float()
            torch.testing.assert_close(layer.score_store.scores, expected_scores, atol=ATOL, rtol=0)
    return actual


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", [None, "left"], ids=["full rows", "left padding"])
def test_eviction_is_exact_with_every_policy(policy, mask):
    mask = None if mask is None else left_padding()
    actual = assert_same_as_never_evicting("llama", POLICIES[policy], [8, 8], mask)
    model = make_model("llama")
    kept_all = run(model, DynamicCache(config=model.config), tokens(), mask)
    assert (actual - kept_all)[:, -1].abs().max() > 0.1, "eviction has to matter here"


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "qwen3", "qwen2", "gemma2", "gpt_oss", "deepseek"])
@pytest.mark.parametrize("mask", [None, "left"], ids=["full rows", "left padding"])
def test_eviction_is_exact_on_model(name, mask):
    assert_same_as_never_evicting(name, H2O, [7, 7], None if mask is None else left_padding())


def test_eviction_with_padding_in_a_later_turn():
    assert_same_as_never_evicting("llama", POLICIES["SnapKV"], [9, 9], ragged_turns())


class KeepsPadding:
    """A careless policy: the first head keeps what is first, padding or not, the second what is last."""

    uses_scores, window = False, None

    def keep(self, scores, positions, budget):
        n = positions.shape[-1]
        kept = torch.stack([torch.arange(budget), torch.arange(n - budget, n)])
        return kept.expand(positions.shape[0], -1, -1).to(positions.device)


def test_eviction_with_padding_kept_in_one_head_only():
    assert_same_as_never_evicting("llama", KeepsPadding, [12, 12], left_padding())


@pytest.mark.parametrize(
    ("budgets", "given"),
    [
        ([5, 14], [5, 14]),
        ([14, 5], lambda layer: 14 - 9 * layer),
        ([0.5, 0.5], 0.5),
        ([0.25, 6], (0.25, 6)),
    ],
    ids=["list", "function", "ratio", "mixed"],
)
def test_eviction_budget_of_each_layer(budgets, given):
    assert_same_as_never_evicting("llama", H2O, budgets, given=given)


def test_eviction_only_every_few_tokens():
    assert_same_as_never_evicting("llama", CAB, [6, 6], every=4)


def switched(name="llama"):
    model = make_model(name)
    replace_attention_with_flash(model)
    return model


def generated(model, cache, ids, mask=None, **kwargs):
    kwargs |= {
        "max_new_tokens": 9,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids) if mask is None else mask,
    }
    return model.generate(ids, past_key_values=cache, **kwargs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_eviction_while_generating(name):
    def two_turns(model, cache):
        first = generated(model, cache, tokens()[:, :15])
        return generated(model, cache, torch.cat([first, tokens()[:, 15:20]], 1))

    model = make_model(name)
    expected = two_turns(model, NeverEvict(model, H2O(), [8, 8]).cache)
    replace_attention_with_flash(model)
    cache = EvictingCache(model, H2O(), 8)
    assert torch.equal(two_turns(model, cache), expected)
    for layer in evicting_layers(cache).values():
        assert layer.keys.shape[2] == 8
        assert layer.get_seq_length() == 15 + 9 + 5 + 8, "the last token is never fed"


def test_eviction_while_generating_ignores_left_padding():
    model, ids, mask = switched(), tokens()[:, :15], left_padding(n=15).long()
    together = generated(model, EvictingCache(model, H2O(), 8), ids * mask, mask)
    alone = generated(model, EvictingCache(model, H2O(), 8), ids[1:, 9:])
    assert torch.equal(together[1, 15:], alone[0, 6:])


def test_eviction_while_beams_are_searched():
    model, ids = switched(), tokens()[:, :15]
    expected = generated(model, DynamicCache(config=model.config), ids, num_beams=3)
    assert torch.equal(generated(model, EvictingCache(model, Full(), 1), ids, num_beams=3), expected)
    evicted = generated(model, EvictingCache(model, H2O(), 6), ids, num_beams=3)
    assert not torch.equal(evicted, expected)


REARRANGE = {
    "reorder_cache": (torch.tensor([1, 0], device=DEVICE), lambda x: x.flip(0)),
    "batch_select_indices": (torch.tensor([1], device=DEVICE), lambda x: x[1:]),
    "batch_repeat_interleave": (2, lambda x: x.repeat_interleave(2, 0)),
}


@pytest.mark.parametrize("method", REARRANGE)
def test_eviction_after_the_batch_is_rearranged(method):
    argument, same = REARRANGE[method]
    model, mask = switched(), left_padding()
    first, then = tokens()[:, :17], tokens()[:, 17:]
    cache = EvictingCache(model, H2O(), 12)  # more than the second sequence has tokens
    run(model, cache, first, mask, (17,))
    getattr(cache, method)(argument)
    masks = same(mask)
    with torch.no_grad():
        actual = [
            model(same(then)[:, i, None], past_key_values=cache, attention_mask=masks[:, : 18 + i].long()).logits
            for i in range(3)
        ]
    cache = EvictingCache(model, H2O(), 12)
    expected = run(model, cache, same(tokens()), masks, (17, 1, 1, 1))[:, 17:]
    torch.testing.assert_close(torch.cat(actual, 1), expected, atol=ATOL, rtol=0)


def test_eviction_of_nothing_is_a_plain_cache():
    model = switched()
    for policy, budget in [(Full(), 3), (H2O(), 1.0), (SnapKV(), N_TOKENS)]:
        cache = EvictingCache(model, policy, budget)
        actual = run(model, cache, tokens())
        assert torch.equal(actual, run(model, DynamicCache(config=model.config), tokens()))
        assert cache.layers[0].keys.shape[2] == N_TOKENS


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_eviction_to_a_new_budget_is_that_of_a_new_cache(name):
    model, ids = switched(name), tokens()
    expected = EvictingCache(model, H2O(), [7, 5])
    cache = EvictingCache(model, H2O(), 1.0)
    cache.set_budget(0.9)  # of nothing yet
    for each in (cache, expected):
        run(model, each, ids, left_padding(), (17,))
    cache.set_budget([7, 5])
    results = [run(model, each, ids[:, 17:], turns=(1, 4)) for each in (cache, expected)]
    assert torch.equal(*results)
    assert cache.layers[1].keys.shape[2] == 5


def test_eviction_without_scores_computes_none():
    model = switched()
    for policy in (Full(), Random(), StreamingLLM()):
        cache = EvictingCache(model, policy, 5)
        run(model, cache, tokens())
        assert all(layer.score_store.scores is None for layer in cache.layers)


def test_eviction_starts_anew_after_reset():
    model = switched()
    cache = EvictingCache(model, CAB(), 6)
    first = run(model, cache, tokens(), left_padding())
    cache.reset()
    assert cache.get_seq_length() == 0
    assert all(layer.keys is None and layer.values is None for layer in cache.layers)
    assert torch.equal(run(model, cache, tokens(), left_padding()), first)


def test_eviction_goes_on_in_a_copy():
    model, ids = switched(), tokens()
    cache = EvictingCache(model, H2O(), 6)
    run(model, cache, ids, turns=(17,))
    other = copy.deepcopy(cache)
    results = [run(model, each, ids[:, 17:], turns=(1, 4)) for each in (cache, other)]
    assert torch.equal(*results)
    assert other.layers[0].keys is not cache.layers[0].keys


def test_eviction_refuses_another_attention():
    model = make_model("llama")
    with pytest.raises(ValueError, match="replace_attention_with_flash"):
        EvictingCache(model, H2O(), 6)
    replace_attention_with_flash(model)
    cache = EvictingCache(model, H2O(), 6)
    restore_attention(model)
    run(model, cache, tokens(), turns=(5,))
    with pytest.raises(RuntimeError, match="replace_attention_with_flash"):
        run(model, cache, tokens(), turns=(5,))


def test_eviction_refuses_models_of_sliding_layers_only():
    with pytest.raises(ValueError, match="mistral has no layer of full attention"):
        EvictingCache(switched("mistral"), H2O(), 6)


def test_eviction_refuses_to_crop():
    model = switched()
    cache = EvictingCache(model, H2O(), 6)
    run(model, cache, tokens(), turns=(9,))
    with pytest.raises(NotImplementedError, match="assisted"):
        cache.crop(-1)


@pytest.mark.parametrize(
    ("budget", "options", "error", "message"),
    [
        (0, {}, ValueError, "at least 1"),
        (0.0, {}, ValueError, "in \\(0, 1\\]"),
        (1.5, {}, ValueError, "in \\(0, 1\\]"),
        (True, {}, TypeError, "int or a float"),
        ("8", {}, TypeError, "int or a float"),
        ([8], {}, ValueError, "each of 2 layers, got 1"),
        (lambda layer: layer, {}, ValueError, "at least 1, or"),
        ([8, 8, 8], {}, ValueError, "each of 2 layers, got 3"),
        (-0.5, {}, ValueError, "in \\(0, 1\\]"),
        (-8, {}, ValueError, "at least 1, or"),
        (8, {"every": 0}, ValueError, "every"),
        (8, {"every": True}, ValueError, "every must be an int of at least 1, got True"),
        (8, {"every": 2.0}, ValueError, "every must be an int of at least 1, got 2.0"),
        (8, {"policy": object()}, TypeError, "policy must be an object with keep"),
        (8, {"policy": H2O}, TypeError, "policy"),
    ],
)
def test_eviction_refuses(budget, options, error, message):
    arguments = {"policy": H2O(), "budget": budget} | options
    with pytest.raises(error, match=message):
        EvictingCache(switched(), **arguments)


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [
        (H2O, {"recent": 1.5}),
        (H2O, {"recent": True}),
        (CAB, {"local": 0.5}),
        (CAB, {"local": -0.1, "bridge": 0.6}),
        (StreamingLLM, {"sinks": -1}),
        (SnapKV, {"window": 0}),
        (SnapKV, {"kernel": 4}),
        (SnapKV, {"pooling": "sum"}),
    ],
)
def test_eviction_policy_refuses(policy, arguments):
    with pytest.raises(ValueError, match="must"):
        policy(**arguments)


def test_eviction_policy_of_the_users_own_is_checked():
    class KeepsTooFew:
        uses_scores, window = False, None

        def keep(self, scores, positions, budget):
            return torch.zeros(*positions.shape[:2], budget - 1, dtype=torch.int64)

    model = switched()
    with pytest.raises(ValueError, match="KeepsTooFew"):
        run(model, EvictingCache(model, KeepsTooFew(), 6), tokens())


def test_eviction_random_draws_from_its_seed():
    positions = torch.arange(30).expand(2, 3, 30)
    first, second, other = (Random(seed).keep(None, positions, 10) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert (first.diff(dim=-1) > 0).all()
    many = Random().keep(None, positions.repeat(500, 1, 1), 10)
    counts = many.flatten().bincount(minlength=30)  # of 3000 draws each is kept in 1000, with a deviation of 26
    assert ((counts - 1000).abs() < 150).all()


def test_sizes_of_masks_by_number_or_by_positions():
    """transformers 4 hands over the positions of the new tokens, later versions their number."""
    layer = EvictingLayer(H2O())
    keys = torch.randn(1, 2, 7, 16)
    layer.update(keys, keys)
    for new in (5, torch.arange(7, 12)):
        assert layer.get_mask_sizes(new) == (12, 0)


def test_the_attention_of_a_model_of_several_kinds_is_that_of_its_text():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlavaConfig(text_config=LlamaConfig(**sizes))
    config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="llava has another attention"):
        EvictingCache(config, H2O(), 5)
    config.text_config._attn_implementation = NAME
    assert len(evicting_layers(EvictingCache(config, H2O(), 5))) == 2
