"""A cache for transformers' models that keeps no more keys than its budget.

After `replace_attention_with_flash(model)`, `model.generate(inputs, past_key_values=EvictingCache(model, H2O(), 256))`
evicts as it goes. The attention of a forward pass sees everything that the cache held before it, and the pass's own
tokens; then each layer evicts, for each sequence and KV head by itself. Positions stay what they were.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..huggingface import NAME
from ..huggingface.score_keeping import ScoreKeeping
from .policies import PADDING, Policy

Budget = int | float
Budgets = Budget | list[Budget] | tuple[Budget, ...] | Callable[[int], Budget]


class EvictingCache(DynamicCache):
    """A cache whose layers of full attention evict; sliding, chunked and linear layers stay as transformers has them.

    Args:
        model: a model after `replace_attention_with_flash`, or its configuration.
        policy: chooses what is kept, in all layers.
        budget: how many keys a layer keeps of each sequence for each KV head: an int, or as a float in (0, 1] a share
            of the tokens seen so far (padding included), rounded up; or one such for every layer, in a list or by a
            function of the layer's number. Layers that do not evict ignore theirs.
        every: evict only when a layer is this many keys over its budget, which saves work while decoding.

    Raises:
        TypeError, ValueError: a budget, `every` or the policy is not as above; the model has another attention, or no
            layer to evict from.
    """

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        policy: Policy,
        budget: Budgets,
        *,
        every: int = 1,
    ):
        config = model if isinstance(model, PretrainedConfig) else model.config
        if config.get_text_config(decoder=True)._attn_implementation != NAME:
            raise ValueError(
                f"{config.model_type} has another attention: call replace_attention_with_flash(model) first"
            )
        super().__init__(config=config)
        if isinstance(policy, type) or not callable(getattr(policy, "keep", None)):
            raise TypeError(f"policy must be an object with keep(scores, positions, budget), got {policy!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an int of at least 1, got {every!r}")
        evicting = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not evicting:
            raise ValueError(f"{config.model_type} has no layer of full attention, which is all that is evicted from")
        for i in evicting:
            self.layers[i] = EvictingLayer(policy, every)
        self.set_budget(budget)

    def set_budget(self, budget: Budgets) -> None:
        """Give the layers other budgets, and evict at once where these are smaller; `budget` is as for a new cache."""
        for layer, of_layer in zip(self.layers, _budgets(budget, len(self.layers)), strict=True):
            if isinstance(layer, EvictingLayer):
                layer.budget = of_layer
                layer.evict()


class EvictingLayer(ScoreKeeping, DynamicLayer):
    """The keys, values, scores and positions that one layer has kept, all of the same N.

    `keys` and `values` are [B, Hk, N, D], `score_store.scores` is [B, Hk, N] fp32 (None where the policy needs none),
    `positions` [B, Hk, N] int64: the number of the token in its sequence, -1 for padding. Where a cache holds latents
    that all heads share (DeepSeek), Hk is 1, and what is kept is chosen by the sum over all heads.
    """

    is_croppable = False

    def __init__(self, policy: Policy, every: int = 1):
        super().__init__()
        self.policy, self.every = policy, every
        self.budget: Budget = 1.0
        self.positions: Tensor | None = None
        self._has_padding = False
        self._unattended = 0  # new tokens whose attention has not been computed yet

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append new keys and values; returns all that are left."""
        if self._unattended:
            raise RuntimeError(
                "a cache that evicts needs the attention of replace_attention_with_flash(model), in every layer that "
                "it evicts from; the last forward pass had another, or was interrupted (then reset the cache)"
            )
        n_new, seen = key_states.shape[-2], self.get_seq_length()
        positions = torch.arange(seen, seen + n_new, device=key_states.device).expand(*key_states.shape[:2], n_new)
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=-1)
        self._unattended = n_new
        return super().update(key_states, value_states, *args, **kwargs)

    def visible_keys(self, new: Tensor | None) -> Tensor | None:
        """Say which keys are no padding, given which of the new tokens are not; see `huggingface/score_keeping.py`."""
        assert self.positions is not None  # `update` comes first
        if new is not None:
            older, newest = self.positions.split([self.positions.shape[-1] - new.shape[1], new.shape[1]], dim=-1)
            self.positions = torch.cat([older, newest.masked_fill(~new[:, None], PADDING)], dim=-1)
            self._has_padding = True
        if not self._has_padding:
            return None
        real = self.positions != PADDING
        return real[:, 0] if real.shape[1] == 1 else real

    def wanted_queries(self, n_q: int) -> tuple[int, int] | None:
        if not self.policy.uses_scores:
            return None
        return max(n_q - (self.policy.window or n_q), 0), n_q

    def add_scores(self, sums: Tensor, offset: int) -> None:
        assert self.positions is not None  # `update` comes first
        sums = sums.unflatten(1, (self.positions.shape[1], -1)).sum(2)
        if self.policy.window is not None:
            left = max(1 - self._unattended / self.policy.window, 0)
            self.score_store.change(lambda scores: scores * left)
        self.score_store.add(sums, offset)

    def after_attention(self, query: Tensor, n_q: int) -> None:
        """Evict, now that the pass's own queries have seen everything; see `huggingface/score_keeping.py`."""
        self._unattended = 0
        self.evict()

    def evict(self) -> None:
        """Evict down to the budget, if the layer is far enough over it."""
        n_kept = 0 if self.positions is None else self.positions.shape[-1]
        budget = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * self.get_seq_length())
        if n_kept < budget + self.every:
            return
        assert self.positions is not None  # n_kept > 0, and so for keys and values
        assert self.keys is not None
        assert self.values is not None
        kept = self.policy.keep(self.score_store.scores, self.positions, budget)
        if kept.shape[-1] == n_kept:
            return
        if kept.shape != (*self.positions.shape[:2], budget):
            raise ValueError(f"{self.policy} kept {list(kept.shape)}, not {[*self.positions.shape[:2], budget]}")
        self.keys, self.values = (
            x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (self.keys, self.values)
        )
        self.positions = self.positions.gather(-1, kept)
        self.score_store.change(lambda scores: scores.gather(-1, kept))

    def get_seq_length(self) -> int:
        """Return how many tokens the layer has seen, evicted ones included: the next token's position."""
        return self.score_store.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return how many keys the next pass attends to, and how many tokens its sequence has beyond these.

        Args:
            query_length: the number of new tokens; in transformers 4 their positions.
        """
        n_new = query_length if isinstance(query_length, int) else query_length.shape[0]
        n_kept = 0 if self.positions is None else self.positions.shape[-1]
        return n_kept + n_new, self.get_seq_length() - n_kept

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.score_store.seen = 0
        super().reset()
        self.positions, self._unattended, self._has_padding = None, 0, False

    def crop(self, *args, **kwargs) -> None:
        """Refuse: what was evicted to make room for the tokens that would go is lost."""
        raise NotImplementedError("a cache that evicts cannot be cropped, so it cannot be used for assisted decoding")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_positions(lambda positions: positions.index_select(0, beam_idx.to(positions.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_positions(lambda positions: positions.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_positions(lambda positions: positions[indices])

    def _change_positions(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.positions is not None:
            self.positions = function(self.positions)


def _budgets(budget: Budgets, n_layers: int) -> list[Budget]:
    """Return every layer's budget."""
    if callable(budget):
        budgets = [budget(i) for i in range(n_layers)]
    elif isinstance(budget, list | tuple):
        budgets = list(budget)
    else:
        budgets = [budget] * n_layers
    if len(budgets) != n_layers:
        raise ValueError(f"budget must be one, or one for each of {n_layers} layers, got {len(budgets)}")
    for x in budgets:
        if isinstance(x, bool) or not isinstance(x, int | float):
            raise TypeError(f"a budget must be an int or a float, got {x!r}")
        if x < 1 if isinstance(x, int) else not 0 < x <= 1:
            raise ValueError(f"a budget must be an int of at least 1, or a float in (0, 1], got {x!r}")
    return budgets
