"""The course's tiny model: it loads offline, its report is true, and its attention can be looked into."""

import math
import socket

import pytest
import torch
import transformers

from course.heads import (
    attention_weights,
    best_head,
    induction_chance,
    induction_scores,
    mean_loss,
    previous_token_scores,
    repeated_sequences,
)
from course.model import (
    MODEL_DIR,
    capture_qkv,
    decode,
    encode,
    held_out_windows,
    load_model,
    report,
    token_labels,
)
from course.train_tiny_model import CHECKED_WINDOWS

TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank."


@pytest.fixture(scope="module")
def model():
    return load_model()


def test_loads_without_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was looked for on the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = load_model()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_loads_with_plain_transformers(model):
    plain = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True)
    assert type(plain) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_is_small(model):
    assert 0.9e6 < model.num_parameters() < 1.1e6
    assert model.num_parameters() == report()["parameters"]
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 5e6


def test_reported_loss_is_the_weights_loss(model):
    measured = mean_loss(model, held_out_windows()[:CHECKED_WINDOWS])
    assert measured == pytest.approx(report()[f"validation_loss_first_{CHECKED_WINDOWS}_windows"], abs=1e-4)


def test_report_agrees_with_itself():
    stated = report()
    assert stated["validation_loss"] < math.log(256) / 2
    assert stated["validation_loss_bits_per_byte"] == pytest.approx(stated["validation_loss"] / math.log(2))
    assert stated["tokens"] == stated["steps"] * stated["batch"] * stated["context"]
    best = min(stated["history"], key=lambda entry: entry["held_out"])
    assert best["step"] == stated["best_step"]
    assert best["held_out"] == pytest.approx(stated["validation_loss"], abs=1e-3)


def test_has_an_induction_head(model):
    sequences = repeated_sequences()
    scores, chance = induction_scores(model, sequences), induction_chance(sequences)
    stated = report()
    torch.testing.assert_close(scores, torch.tensor(stated["induction"]), atol=1e-4, rtol=0)
    assert chance == stated["induction_chance"]
    assert best_head(scores)[:2] == (stated["best_induction_head"]["layer"], stated["best_induction_head"]["head"])
    assert best_head(scores).score >= 10 * chance
    assert stated["repeat_loss"]["second_occurrence"] < stated["repeat_loss"]["first_occurrence"] / 2


def test_has_a_previous_token_head(model):
    scores = previous_token_scores(model, held_out_windows()[:CHECKED_WINDOWS, :-1])
    torch.testing.assert_close(scores, torch.tensor(report()["previous_token"]), atol=1e-4, rtol=0)
    assert best_head(scores).score > 0.3


def test_induction_score_of_known_attention():
    """With every key alike the weights are uniform, and the score is chance."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    blank = transformers.LlamaForCausalLM(config).eval()
    for layer in blank.model.layers:
        torch.nn.init.zeros_(layer.self_attn.k_proj.weight)
    sequences = repeated_sequences(per_length=1)
    expected = torch.full((2, 2), induction_chance(sequences))
    torch.testing.assert_close(induction_scores(blank, sequences), expected)


def test_captured_tensors_are_what_attention_was_given(model):
    input_ids = encode(TEXT).repeat(2, 1)
    outputs = []  # each layer's attention output, as its output projection receives it
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids)
    for hook in hooks:
        hook.remove()

    captured = capture_qkv(model, input_ids)
    config, n = model.config, input_ids.shape[1]
    assert len(captured) == len(outputs) == config.num_hidden_layers
    for qkv, output in zip(captured, outputs, strict=True):
        assert qkv.q.shape == (2, config.num_attention_heads, n, config.head_dim)
        assert qkv.k.shape == qkv.v.shape == (2, config.num_key_value_heads, n, config.head_dim)
        v = qkv.v.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=1)
        expected = (attention_weights(qkv) @ v).transpose(1, 2).flatten(2)  # [B, N, Hq·D]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_attention_weights_equal_eager(model):
    input_ids = encode(TEXT)
    eager = transformers.LlamaForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True, attn_implementation="eager")
    with torch.no_grad():
        expected = eager(input_ids, output_attentions=True).attentions
    for qkv, weights in zip(capture_qkv(model, input_ids), expected, strict=True):
        torch.testing.assert_close(attention_weights(qkv), weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_capture_puts_the_implementation_back(model, implementation):
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        capture_qkv(model, encode("a"))
        assert model.config._attn_implementation == implementation
        with pytest.raises(IndexError):
            capture_qkv(model, torch.tensor([[256]]))  # one past the last byte
        assert model.config._attn_implementation == implementation
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("text", ["", "Alice\n", "tab\tand\0zero", "“naïve” ␣ 注意"])
def test_bytes_round_trip(text):
    token_ids = encode(text)
    assert token_ids.shape == (1, len(text.encode()))
    assert token_ids.dtype == torch.long
    assert decode(token_ids) == decode(token_ids[0]) == text
    assert len(token_labels(text)) == token_ids.shape[1]


def test_token_labels_are_printable():
    assert token_labels("a b\né\t~") == ["a", "␣", "b", "⏎", "c3", "a9", "09", "~"]


def test_repeated_sequences_repeat():
    for input_ids in repeated_sequences():
        first, second = input_ids.chunk(2, dim=1)
        assert torch.equal(first, second)
    assert torch.equal(repeated_sequences()[0], repeated_sequences()[0])
