"""The oracle of eviction: attention by definition over a cache that keeps everything, with the evicted keys masked."""

import math

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from stage5_eviction.policies import PADDING

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # attention that is far from uniform
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "query_pre_attn_scalar": 8}
OF_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SHARED = ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**OF_GPT2, **{name: SIZES[name] for name in SHARED})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HYBRID, attn_logit_softcapping=4.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HYBRID)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
}


def make_model(name):
    """Make a tiny model with random weights, the same ones every time."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


class NeverEvict:
    """Runs a model on a stock cache without sliding layers, and hides in each full layer what the policy evicts.

    Args:
        model: switched to this attention until another is set.
        policy, budgets, every: as EvictingCache has them, with a budget for each layer.
    """

    def __init__(self, model, policy, budgets, every=1):
        self.policy, self.budgets, self.every = policy, budgets, every
        self.cache = DynamicCache()
        self.left, self.scores = {}, {}  # by layer: [B, Hk, N] bool and float64
        AttentionInterface.register("never_evict", self.attend)
        AttentionMaskInterface.register("never_evict", lambda *args, attention_mask=None, **kwargs: attention_mask)
        model.set_attn_implementation("never_evict")

    def attend(
        self, module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs
    ):
        n_q, n_k, layer = query.shape[2], key.shape[2], module.layer_idx
        real = torch.ones(key.shape[0], n_k, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        left = self.left.get(layer, real.new_ones(*key.shape[:2], 0))
        left = F.pad(left, (0, n_k - left.shape[2]), value=True)
        behind = torch.arange(n_k - n_q, n_k)[:, None] - torch.arange(n_k)
        visible = (behind >= 0) & (behind < (sliding_window or n_k)) & (left & real[:, None])[:, :, None]
        q, k, v = query.double().unflatten(1, (key.shape[1], -1)), key.double()[:, :, None], value.double()[:, :, None]
        logits = q @ k.mT * (query.shape[3] ** -0.5 if scaling is None else scaling)  # [B, Hk, G, n_q, n_k]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        weights = logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1).nan_to_num()
        if sliding_window is None:
            self.evict(layer, weights * real[:, None, None, n_k - n_q :, None], left, real)
        return (weights @ v).flatten(1, 2).transpose(1, 2).to(query.dtype), None

    def evict(self, layer, weights, left, real):
        n_q, n_k = weights.shape[3:]
        window = self.policy.window or n_q
        fade = 1.0 if self.policy.window is None else max(1 - n_q / window, 0.0)
        old = self.scores.get(layer, weights.new_zeros(*left.shape[:2], 0))
        scores = F.pad(old * fade, (0, n_k - old.shape[2])) + weights[..., max(n_q - window, 0) :, :].sum((2, 3))
        self.left[layer], self.scores[layer] = left, scores
        budget = self.budgets[layer]
        budget = math.ceil(budget * n_k) if isinstance(budget, float) else budget
        n_left = int(left[0, 0].sum())
        if n_left >= budget + self.every:
            positions = left.nonzero()[:, -1].view(*left.shape[:2], n_left)
            names = positions.where(real[:, None].expand_as(left).gather(-1, positions), PADDING)
            kept = self.policy.keep(scores.gather(-1, positions).float(), names, budget)
            self.left[layer] = torch.zeros_like(left).scatter(-1, positions.gather(-1, kept), True)
