"""Hugging Face models give eager attention's output, and keep the attention that each of their keys has had."""

import copy
import itertools
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_models import (  # noqa: E402
    CONFIGS,
    assert_scores,
    eager_model,
    eager_scores,
    padding,
    positions,
    scoring_model,
    tokens,
)
from transformers import DynamicCache, LogitsProcessor, StaticCache  # noqa: E402

from course.largest_tensor import LargestTensor  # noqa: E402
from flash_attention_with_scores.huggingface import (  # noqa: E402
    get_all_cumulative_scores,
    replace_attention_with_flash,
    reset_cumulative_scores,
    restore_attention,
)
from flash_attention_with_scores.huggingface.attention import Requests  # noqa: E402
from flash_attention_with_scores.huggingface.score_keeping import keep_scores  # noqa: E402

LLAMA, GPT2, NEOX, QWEN2, GEMMA2, GPT_OSS = (
    next(name for name in CONFIGS if name.startswith(family))
    for family in ("llama", "gpt2", "gpt_neox", "qwen2", "gemma2", "gpt_oss")
)
each_model = pytest.mark.parametrize("name", CONFIGS)


def own_copy(name, **options):
    """Return a model that a test may change."""
    return replace_attention_with_flash(copy.deepcopy(eager_model(name)), **options)


@torch.no_grad()
def feed(model, ids, mask, lengths, cache):
    """Feed what the cache has not seen of ids, in chunks of the given lengths, and return the logits."""
    logits, begin = [], int(cache.get_seq_length())
    for length in lengths:
        now = slice(begin, begin + length)
        own = {"attention_mask": mask[:, : now.stop], "position_ids": positions(mask)[:, now]}
        logits.append(model(ids[:, now], past_key_values=cache, use_cache=True, **own).logits)
        begin = now.stop
    return torch.cat(logits, 1)


def make_cache(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=20)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


@each_model
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_output_weights_and_scores_equal_eager(name, side):
    model, ids, mask = scoring_model(name), tokens(), padding(side)
    logits, weights, expected = eager_scores(name, ids, mask)
    real = mask.bool()
    for use_cache in (False, True):
        with torch.no_grad():
            out = model(
                ids, attention_mask=mask, position_ids=positions(mask), output_attentions=True, use_cache=use_cache
            )
        torch.testing.assert_close(out.logits[real], logits[real], rtol=1e-4, atol=1e-4)
        for actual, w in zip(out.attentions, weights, strict=True):
            torch.testing.assert_close(actual * mask[:, None, :, None], w, rtol=1e-4, atol=1e-5)
        scores = get_all_cumulative_scores(model)
        assert_scores(scores, expected)
        modules = dict(model.named_modules())
        for path, given in scores.items():
            assert "Attention" in type(modules[path]).__name__
            assert given.dtype == torch.float32
            assert not given.isnan().any()
            assert (given.transpose(1, 2)[~real] == 0).all()
            # a query gives 1 in each head of a group, less with sinks
            total, most = given.sum((1, 2)), 4 * mask.sum(1).float()
            if "sinks" in name:
                assert (total < most - 0.01).all()
            else:
                torch.testing.assert_close(total, most, rtol=1e-5, atol=0)


@each_model
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_and_single_tokens_add_up_to_the_whole(name, kind, side):
    if "Dv" in name and kind == "static" and transformers.__version__ < "5":
        pytest.skip("StaticCache of transformers 4 has one head dimension for keys and values")
    model, ids, mask = scoring_model(name), tokens(), padding(side)
    logits, _, expected = eager_scores(name, ids, mask)
    real = mask.bool()
    for lengths in ((11,), (4, 3, 4), (1,) * 11, (7, 1, 1, 2)):
        cache = make_cache(kind, model)
        torch.testing.assert_close(feed(model, ids, mask, lengths, cache)[real], logits[real], rtol=1e-4, atol=1e-4)
        assert_scores(get_all_cumulative_scores(model), expected)


def test_nothing_is_as_large_as_a_mask():
    model, ids, mask = scoring_model(QWEN2), tokens(length=2048), padding("left", length=2048)
    with LargestTensor() as largest:
        feed(model, ids, mask, (1000, 1048), make_cache("dynamic", model))
    assert largest.bytes < 2048 * 2048


def test_pads_between_turns_give_no_attention():
    model, ids, mask = scoring_model(LLAMA), tokens(), padding("none")
    mask[1, 5:8] = 0  # the second turn's left padding: its queries do see the first turn
    for lengths in ((11,), (5, 6), (1,) * 11):
        feed(model, ids, mask, lengths, DynamicCache())
        assert_scores(get_all_cumulative_scores(model), eager_scores(LLAMA, ids, mask)[2])


@each_model
@pytest.mark.parametrize("how", ["greedy", "sampling", "beams", "static"])
def test_generate(name, how):
    if "Dv" in name and how == "static" and transformers.__version__ < "5":
        pytest.skip("StaticCache of transformers 4 has one head dimension for keys and values")
    options = {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "top_k": 5},
        "beams": {"do_sample": False, "num_beams": 3},
        "static": {"do_sample": False, "cache_implementation": "static"},
    }[how]
    ids, mask = tokens(), padding("left")
    fed = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            fed.append((input_ids.clone(), get_all_cumulative_scores(model)))
            return scores

    results = []
    model = scoring_model(name)
    for m, processors in ((eager_model(name), []), (model, [Spy()])):
        torch.manual_seed(2)
        results.append(
            m.generate(
                ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, logits_processor=processors, **options
            )
        )
    assert torch.equal(*results)
    sequences, scores = fed[-1]
    grown = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    grown = grown.repeat_interleave(len(sequences) // len(mask), 0)
    assert_scores(scores, eager_scores(name, sequences, grown)[2])  # of the beams as they are by then
    assert sequences.shape[1] == 11 + 7  # generate never feeds the last token
    if how == "beams":
        assert any((now[:, : past.shape[1]] != past).any() for (past, _), (now, _) in itertools.pairwise(fed))
    else:
        assert_scores(get_all_cumulative_scores(model), list(scores.values()))  # outlive generate's cache


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_returns_attentions(cache):
    ids = tokens()
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    options["cache_implementation"] = cache
    expected, actual = (m(LLAMA).generate(ids, **options) for m in (eager_model, scoring_model))
    for step, eager_step in zip(actual.attentions, expected.attentions, strict=True):
        for weights, eager_weights in zip(step, eager_step, strict=True):
            torch.testing.assert_close(weights, eager_weights, rtol=1e-4, atol=1e-5)


def test_reset_and_fresh_and_interleaved_caches():
    model, ids, mask = scoring_model(QWEN2), tokens(4), padding("left", 4)
    expected = eager_scores(QWEN2, ids, mask)[2]
    halves = [(ids[rows], mask[rows], DynamicCache()) for rows in (slice(2), slice(2, 4))]
    for length in (6, 1, 4):
        for half in halves:
            feed(model, *half[:2], (length,), half[2])
    for i, (_, _, cache) in enumerate(halves):
        assert_scores(get_all_cumulative_scores(model, cache), [s[2 * i : 2 * i + 2] for s in expected])
    assert_scores(get_all_cumulative_scores(model), [s[2:] for s in expected])  # of the cache that came last

    cache = halves[0][2]
    reset_cumulative_scores(model, cache)
    assert get_all_cumulative_scores(model, cache) == {}
    assert_scores(get_all_cumulative_scores(model), [s[2:] for s in expected])
    reset_cumulative_scores(model)
    assert get_all_cumulative_scores(model) == {}
    feed(model, torch.cat([ids[:2], tokens(2, 1)], 1), padding("none", length=12), (1,), cache)
    for scores in get_all_cumulative_scores(model).values():
        assert scores.shape == (2, 2, 12)  # the old keys are still there, and start at 0
        torch.testing.assert_close(scores.sum((1, 2)), torch.full((2,), 4.0))


@pytest.mark.parametrize("name", [LLAMA, GPT2, QWEN2])
def test_cache_operations_take_the_scores_along(name):
    model, ids, cache = scoring_model(name), tokens(4, 5), DynamicCache()
    feed(model, ids, padding("none", 4, 5), (5,), cache)
    for change, argument, rows in (
        ("reorder_cache", torch.tensor([1, 1, 3, 0]), [1, 1, 3, 0]),
        ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
    ):
        getattr(cache, change)(argument)
        ids = torch.cat([ids[rows], tokens(len(rows), 2)], 1)
        mask = torch.ones_like(ids)
        feed(model, ids, mask, (2,), cache)
        assert_scores(get_all_cumulative_scores(model), eager_scores(name, ids, mask)[2])


def test_copies_and_pickles_of_a_cache_keep_its_scores():
    model, ids = scoring_model(QWEN2), tokens()
    cache = make_cache("dynamic", model)
    feed(model, ids, padding("none"), (8,), cache)
    before = get_all_cumulative_scores(model, cache)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert_scores(get_all_cumulative_scores(model, twin), list(before.values()))
        with torch.no_grad():
            model(ids[:, 8:], past_key_values=twin)
        assert_scores(get_all_cumulative_scores(model, twin), eager_scores(QWEN2, ids, padding("none"))[2])
        assert_scores(get_all_cumulative_scores(model, cache), list(before.values()))


def test_double_precision():
    model, ids, cache = own_copy(LLAMA).double(), tokens(), DynamicCache()
    feed(model, ids, padding("none"), (8, 3), cache)
    assert {scores.dtype for scores in get_all_cumulative_scores(model).values()} == {torch.float32}
    assert_scores(get_all_cumulative_scores(model), eager_scores(LLAMA, ids, padding("none"))[2])


def test_stock_layers_stay_registered():
    mapping = getattr(transformers.cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})  # since 5.0
    try:

        class Custom(transformers.cache_utils.DynamicLayer):
            _layer_type = "custom"

        before = dict(mapping)
        assert isinstance(keep_scores([Custom()], 0), Custom)
        assert mapping == before
    finally:
        mapping.pop("custom", None)


def test_crop_drops_the_scores_of_what_goes():
    model, ids, mask, cache = scoring_model(LLAMA), tokens(), padding("none"), DynamicCache()
    feed(model, ids, mask, (8, 3), cache)
    before = get_all_cumulative_scores(model)
    cache.crop(-3)
    assert_scores(get_all_cumulative_scores(model), [scores[..., :8] for scores in before.values()])
    feed(model, ids, mask, (2,), cache)
    assert [scores.shape for scores in get_all_cumulative_scores(model).values()] == [(2, 2, 10)] * 2


def test_keys_that_were_dropped_behind_the_layers_back():
    model = own_copy(LLAMA)
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, 5:], layer.values[:, :, 5:]
        with pytest.raises(ValueError, match=r"given 12 tokens but holds 7: .* module_filter"):
            model(tokens(length=1), past_key_values=cache)


def test_weights_slot_and_filter():
    ids, mask = tokens(), padding("left")
    _, weights, expected = eager_scores(LLAMA, ids, mask)
    model = own_copy(LLAMA, module_filter=lambda path, module: path.endswith("1.self_attn"), weights_slot="column_sums")
    slots = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: slots.append(output[1]))
    for options in ({}, {"output_attentions": True}):
        slots.clear()
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=positions(mask), **options)
        for slot, w in zip(slots, weights, strict=True):
            assert slot.dtype == torch.float32
            torch.testing.assert_close(slot, w.sum(2, keepdim=True), rtol=1e-5, atol=5e-6)
        assert list(get_all_cumulative_scores(model)) == ["model.layers.1.self_attn"]
        assert_scores(get_all_cumulative_scores(model), expected[1:])


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_copies_of_a_model_keep_scores_of_their_own():
    model, (first, second) = own_copy(LLAMA), (tokens(), tokens())
    feed(model, first, padding("none"), (11,), DynamicCache())
    twin = copy.deepcopy(model)
    feed(twin, second, padding("none"), (11,), DynamicCache())
    assert_scores(get_all_cumulative_scores(model), eager_scores(LLAMA, first, padding("none"))[2])
    assert_scores(get_all_cumulative_scores(twin), eager_scores(LLAMA, second, padding("none"))[2])
    hooks = count_hooks(model)
    assert count_hooks(restore_attention(twin)) < hooks == count_hooks(model)


def test_restore():
    model = copy.deepcopy(eager_model(LLAMA))
    keys, hooks, compiles = set(model.state_dict()), count_hooks(model), model.generation_config.disable_compile
    replace_attention_with_flash(model)
    ids = tokens()
    with torch.no_grad():
        expected = eager_model(LLAMA)(ids, output_attentions=True)
        model(ids)
    assert replace_attention_with_flash(model) is model  # again: nothing is left of the first time
    assert get_all_cumulative_scores(model) == {}
    assert set(model.state_dict()) == keys
    assert restore_attention(restore_attention(model)) is model
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.disable_compile == compiles
    assert count_hooks(model) == hooks
    with torch.no_grad():
        actual = model(ids, output_attentions=True)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.attentions[0], expected.attentions[0])
    for function in (get_all_cumulative_scores, reset_cumulative_scores):
        with pytest.raises(ValueError, match=r"call replace_attention_with_flash\(model\) first"):
            function(model)


def test_weights_are_wanted_only_while_somebody_asks():
    model, requests = eager_model(LLAMA), Requests("weights", None)
    requests.end()  # of a pass that nobody saw begin
    assert not requests.weights
    requests.begin(model, (), {"output_attentions": True})
    requests.begin(model, (), {})  # a model within the model
    assert requests.weights
    requests.end()
    assert requests.weights
    requests.end()
    assert not requests.weights


@pytest.mark.parametrize("name", [LLAMA, GPT_OSS])
def test_training(name):
    ids = tokens()
    gradients = []
    for model in (copy.deepcopy(eager_model(name)), own_copy(name)):
        model.train()
        model(ids, labels=ids, attention_mask=padding("right"), use_cache=False).loss.backward()
        gradients.append({path: p.grad for path, p in model.named_parameters()})
    for path, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][path], expected, rtol=1e-3, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}"
        )
    assert not any(scores.requires_grad for scores in get_all_cumulative_scores(model).values())


def test_dropout_changes_the_output_and_not_the_scores():
    model, ids = own_copy(GPT2), tokens()
    for block in model.transformer.h:
        block.attn.attn_dropout.p, block.attn.resid_dropout.p = 0.5, 0.0
    outputs = []
    for training in (False, True):
        model.transformer.h[0].attn.train(training)
        with torch.no_grad():
            outputs.append(model(ids).logits)
        first = get_all_cumulative_scores(model)["transformer.h.0.attn"]
        torch.testing.assert_close(first, eager_scores(GPT2, ids, padding("none"))[2][0], rtol=1e-5, atol=5e-6)
    assert not torch.allclose(*outputs)


def test_gpt2_scales():
    config = copy.deepcopy(eager_model(GPT2).config)
    config.scale_attn_by_inverse_layer_idx, config.scale_attn_weights = True, False
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(ids := tokens()).logits
        torch.testing.assert_close(replace_attention_with_flash(model)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_gpt2_cross_attention():
    config = copy.deepcopy(eager_model(GPT2).config)
    config.add_cross_attention = True
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    ids, encoded, mask = tokens(), torch.randn(2, 7, 32), padding("right", length=7)
    inputs = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        expected = model(ids, output_attentions=True, **inputs)
        torch.testing.assert_close(
            replace_attention_with_flash(model)(ids, **inputs).logits, expected.logits, rtol=1e-4, atol=1e-4
        )
    scores = get_all_cumulative_scores(model)
    torch.testing.assert_close(
        scores["transformer.h.1.crossattention"], expected.cross_attentions[1].sum(2), rtol=1e-4, atol=1e-5
    )


def four_d(visible):
    """Return a mask [2, 1, 6, 6] that is True where visible(query, key)."""
    i = torch.arange(6)
    return visible(i[:, None], i[None]).expand(2, 1, 6, 6)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(
    ("visible", "right"),
    [
        (lambda i, j: j <= i, True),
        (lambda i, j: (j <= i) & (i - j < 3), True),
        (lambda i, j: (i - j).abs() <= 2, True),
        (lambda i, j: (j <= i) & (j > 0) | (i + j < 0), True),
        (lambda i, j: i + j >= 0, True),
        (lambda i, j: (j <= i) | (j < 3), False),  # a prefix
        (lambda i, j: (j <= i) & (i // 3 == j // 3), False),  # packed sequences, or chunks
    ],
)
def test_masks_of_the_callers_own(visible, right, additive):
    ids, mask = tokens(length=6), four_d(visible)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        if not right:
            with pytest.raises(ValueError, match="neither that of causal order and padding nor the same for all"):
                scoring_model(LLAMA)(ids, attention_mask=mask)
            return
        bias = mask if additive else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        expected = eager_model(LLAMA)(ids, attention_mask=bias).logits
        sees = four_d(visible).any(-1)[:, 0]
        actual = scoring_model(LLAMA)(ids, attention_mask=mask).logits
        torch.testing.assert_close(actual[sees], expected[sees], rtol=1e-4, atol=1e-4)


def test_masks_that_cannot_be_kept():
    model = scoring_model(LLAMA)
    ids, mask = tokens(length=6), four_d(lambda i, j: j <= i)
    bias = torch.where(mask, -0.1, -torch.inf)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)
    heads = mask.repeat(1, 4, 1, 1)
    heads[:, 1, 0, 3] = True
    for message, options in (
        ("adds a bias to the scores", {"attention_mask": bias}),
        ("differs between heads", {"attention_mask": heads}),
        ("packed sequences", {"position_ids": packed, "use_cache": False}),
    ):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            model(ids, **options)


def unsupported(family, **options):
    config = getattr(transformers, f"{family}Config")(vocab_size=64, hidden_size=32, **options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def test_models_that_are_refused():
    bloom, falcon = (
        unsupported("Bloom", n_layer=1, n_head=4),
        unsupported("Falcon", num_hidden_layers=1, num_attention_heads=4),
    )
    for model, path in ((bloom, "transformer.h.0.self_attention"), (falcon, "transformer.h.0.self_attention")):
        with pytest.raises(ValueError, match=rf"attention of its own \({path}\) .* AttentionInterface"):
            replace_attention_with_flash(model)
        assert model.config._attn_implementation == "eager"
    mamba = unsupported("Mamba", num_hidden_layers=1, state_size=2)
    with pytest.raises(ValueError, match="MambaForCausalLM has no attention that goes through"):
        replace_attention_with_flash(mamba)
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        replace_attention_with_flash(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"weights_slot must be one of \('weights', 'column_sums'\), got 'sums'"):
        own_copy(LLAMA, weights_slot="sums")


def test_a_cache_that_is_not_known():
    model = own_copy(LLAMA)
    attention = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="5 keys for 2 queries, but there is no transformers Cache"):
        transformers.AttentionInterface()["attn_with_scores"](attention, query, key, key, None)


def test_a_module_that_bypasses_the_interface_is_noticed():
    model = own_copy(LLAMA)
    attention = model.model.layers[0].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(RuntimeError, match="LlamaAttention did not call the attention function"), torch.no_grad():
        model(tokens())
    stray = copy.deepcopy(eager_model(LLAMA))
    stray.set_attn_implementation("attn_with_scores")
    with pytest.raises(RuntimeError, match=r"call replace_attention_with_flash\(model\)"), torch.no_grad():
        stray(tokens())


def test_encoder_and_decoder():
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4}
    small |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.3}
    config = transformers.BartConfig(vocab_size=64, pad_token_id=0, max_position_embeddings=64, **small)
    model = transformers.BartForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids, mask = tokens(), padding("right")
    answer = tokens(2, 5)
    with torch.no_grad():
        out = model(ids, mask, decoder_input_ids=answer, output_attentions=True)
        eager = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=2)
        replace_attention_with_flash(model)
        torch.testing.assert_close(model(ids, mask, decoder_input_ids=answer).logits, out.logits, rtol=1e-4, atol=1e-4)
        scores = get_all_cumulative_scores(model)
        assert torch.equal(
            model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=2), eager
        )
        cache = model(ids, mask, decoder_input_ids=answer, use_cache=True).past_key_values
        kept = get_all_cumulative_scores(model, cache)
        assert list(kept) == [path for path in scores if "decoder" in path]
        for path, given in kept.items():
            torch.testing.assert_close(given, scores[path])
    pads = mask[:, None, :, None]
    for path, weights in (
        ("model.encoder.layers.0.self_attn", out.encoder_attentions[0] * pads),
        ("model.decoder.layers.1.self_attn", out.decoder_attentions[1]),
        ("model.decoder.layers.1.encoder_attn", out.cross_attentions[1]),
    ):
        torch.testing.assert_close(scores[path], weights.sum(2), rtol=1e-4, atol=1e-5)


def test_the_kernels_in_the_interpreter(device):
    model = own_copy(LLAMA, backend="triton").to(device)
    ids, mask = tokens(length=5), padding("left", length=5, n_pads=2)
    feed(model, ids.to(device), mask.to(device), (4, 1), make_cache("static", model))
    scores = {path: x.cpu() for path, x in get_all_cumulative_scores(model).items()}
    assert_scores(scores, eager_scores(LLAMA, ids, mask)[2])
