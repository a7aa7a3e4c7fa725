"""Tiny random models of several families, each beside its eager twin, for the tests of the Hugging Face integration."""

from functools import lru_cache

import torch
import transformers
from transformers import AutoModelForCausalLM

from flash_attention_with_scores.huggingface import replace_attention_with_flash

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that attention has peaks
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HYBRID = {"head_dim": 16, "sliding_window": 5}
_LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
CONFIGS = {
    "llama: grouped heads": ("Llama", {}),
    "gpt_neox: a head each": ("GPTNeoX", {"num_key_value_heads": None}),
    "gpt2: positional arguments": ("GPT2", {"num_key_value_heads": None}),
    "qwen3: normalised queries": ("Qwen3", {"head_dim": 16}),
    "mistral: sliding window": ("Mistral", {"sliding_window": 5}),
    "qwen2: sliding and full layers": (
        "Qwen2",
        {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "gemma2: softcap": ("Gemma2", _HYBRID | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gpt_oss: sinks": ("GptOss", _HYBRID | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "deepseek: Dv != D": ("DeepseekV3", _LATENT | _EXPERTS | {"num_key_value_heads": 4, "first_k_dense_replace": 2}),
}
VOCABULARY = range(3, 64)


@lru_cache
def eager_model(name):
    """Return a model with eager attention: a family of CONFIGS, the same weights at each call."""
    family, own = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**_COMMON | own)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@lru_cache
def scoring_model(name):
    """Return the same model with replaced attention."""
    model = eager_model.__wrapped__(name)
    model.load_state_dict(eager_model(name).state_dict())
    return replace_attention_with_flash(model)


def tokens(batch=2, length=11):
    return torch.randint(VOCABULARY.start, VOCABULARY.stop, (batch, length))


def padding(side, batch=2, length=11, n_pads=4):
    """Return an attention mask whose last row has pads on one side ("left", "right" or "none")."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if side != "none":
        mask[-1, slice(None, n_pads) if side == "left" else slice(-n_pads, None)] = 0
    return mask


@torch.no_grad()
def eager_scores(name, ids, mask):
    """Return logits, weights, and of each layer the scores [B, Hk, N] that eager attention's weights add up to."""
    model = eager_model(name)
    out = model(ids, attention_mask=mask, position_ids=positions(mask), output_attentions=True, use_cache=False)
    weights = [w * mask[:, None, :, None] for w in out.attentions]  # rows of pads see nothing that counts
    n_kv_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    return out.logits, weights, [w.sum(2).unflatten(1, (n_kv_heads, -1)).sum(2) for w in weights]


def positions(mask):
    """Return the position of each token among the real ones, as `generate` numbers them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def assert_scores(actual, expected):
    """Compare {module path: scores} with a list of scores by layer."""
    assert len(actual) == len(expected)
    for path, scores in zip(actual, expected, strict=True):
        torch.testing.assert_close(actual[path], scores, rtol=1e-5, atol=5e-6, msg=lambda m, p=path: f"{p}: {m}")
