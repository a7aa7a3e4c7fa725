"""The oracle of eviction: attention by definition over a cache that keeps everything, with the evicted keys masked."""

import math

import torch
import torch.nn.functional as F
from huggingface_models import CONFIGS, eager_model
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from flash_attention_with_scores.eviction.policies import PADDING

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(family):
    """Make a tiny model of a family of CONFIGS that a test may change, with the same weights every time."""
    return eager_model.__wrapped__(next(name for name in CONFIGS if name.startswith(family))).to(DEVICE)


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
        self, module, query, key, value, mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **_
    ):  # fmt: skip
        n_q, n_k, layer = query.shape[2], key.shape[2], module.layer_idx
        n_cached = self.cache.layers[layer].keys.shape[1]  # 1 where all heads' keys are made of the same latents
        real = torch.ones(key.shape[0], n_k, dtype=torch.bool, device=key.device) if mask is None else mask.bool()
        left = self.left.get(layer, real.new_ones(key.shape[0], n_cached, 0))
        left = F.pad(left, (0, n_k - left.shape[2]), value=True)
        number = torch.arange(n_k, device=key.device)
        behind = number[n_k - n_q :, None] - number
        seen = (left & real[:, None]).repeat_interleave(key.shape[1] // n_cached, 1)
        visible = (behind >= 0) & (behind < (sliding_window or n_k)) & seen[:, :, None]
        q, k, v = query.double().unflatten(1, (key.shape[1], -1)), key.double()[:, :, None], value.double()[:, :, None]
        logits = q @ k.mT * (query.shape[3] ** -0.5 if scaling is None else scaling)  # [B, Hk, G, n_q, n_k]
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
        if s_aux is not None:  # one more logit for each query head
            sinks = s_aux.double().view(1, *logits.shape[1:3], 1, 1).expand(*logits.shape[:4], 1)
            logits = torch.cat([logits, sinks], -1)
        weights = logits.softmax(-1).nan_to_num()[..., :n_k]
        if sliding_window is None:
            counted = weights * real[:, None, None, n_k - n_q :, None]
            self.evict(layer, counted.flatten(1, 2).unflatten(1, (n_cached, -1)), left, real)
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
