"""kvpress' ObservedAttentionPress drops the same keys with replaced attention as with eager attention."""

import copy

import pytest
import torch
from huggingface_models import CONFIGS, eager_model, tokens
from kvpress import ObservedAttentionPress
from transformers import DynamicCache

from flash_attention_with_scores.huggingface import get_all_cumulative_scores, replace_attention_with_flash

NAMES = [name for name in CONFIGS if name.startswith(("llama", "qwen3"))]


@pytest.mark.parametrize("name", NAMES)
def test_huggingface_kvpress_keeps_the_same_keys_as_with_eager_attention(name, monkeypatch):
    seen = []
    score = ObservedAttentionPress.score
    monkeypatch.setattr(ObservedAttentionPress, "score", lambda *args: seen.append(score(*args)) or seen[-1])
    eager = eager_model(name)
    ours = replace_attention_with_flash(copy.deepcopy(eager), lambda path, module: False, weights_slot="column_sums")
    ids, caches = tokens(length=21), []
    for model in (eager, ours):
        cache = DynamicCache()
        with ObservedAttentionPress(0.5)(model), torch.no_grad():
            model.model(ids[:, :20], past_key_values=cache)
        with torch.no_grad():
            logits = model(ids[:, 20:], past_key_values=cache, position_ids=torch.full((2, 1), 20)).logits
        caches.append((cache, logits))
    layers = len(seen) // 2
    assert layers == 2
    for expected, actual in zip(seen[:layers], seen[layers:], strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    (expected, expected_logits), (actual, logits) = caches
    for layer, other in zip(actual.layers, expected.layers, strict=True):
        assert layer.keys.shape[2] == 11
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert get_all_cumulative_scores(ours) == {}  # its keys are the press's business
