"""The attention function that transformers' models call, and what a model's attention modules remember for it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from stage1_pytorch_tiled.setting import Setting

from ..masked_sums import attention_weights, masked_attention
from .masks import Sight, new_tokens, read_mask
from .score_keeping import ScoreStore, keep_scores

WATCH = "_attn_with_scores"  # the attribute of an attention module that has its `Watch`
_BIASES = ("head_mask", "position_bias", "attention_bias", "score_mod")


class Requests:
    """What the model's caller wants of a forward pass; one for all modules of a model."""

    def __init__(self, weights_slot: str, backend: str | None):
        self.weights_slot, self.backend = weights_slot, backend
        self._output_attentions = [False]

    @property
    def weights(self) -> bool:
        return self._output_attentions[-1]

    def begin(self, model, args, kwargs) -> None:
        asked = kwargs.get("output_attentions")
        if asked is None:
            asked = self.weights or model.config.output_attentions
        self._output_attentions.append(bool(asked))

    def end(self, *_) -> None:
        if len(self._output_attentions) > 1:
            self._output_attentions.pop()


class Watch:
    """One attention module's part: the cache of the forward pass that runs, and the scores of the last one."""

    def __init__(self, path: str, requests: Requests, keeps_scores: bool):
        self.path, self.requests, self.keeps_scores = path, requests, keeps_scores
        self.store: ScoreStore | None = None
        self.end()

    def end(self) -> None:
        self.cache, self.is_cross, self.was_called = None, False, False

    def begin(self, module, args, kwargs) -> None:
        given = [*args, *kwargs.values()]
        self.cache = next((x for x in given if isinstance(x, Cache)), None)
        self.is_cross = any(kwargs.get(name) is not None for name in ("encoder_hidden_states", "key_value_states"))
        self.was_called = False

    def check_called(self, module, args, output) -> None:
        was_called = self.was_called
        self.end()
        if not was_called and output is not None:  # None after an exception
            raise RuntimeError(f"{type(module).__name__} did not call the attention function that it was switched to")

    def keep(self, layer, sums: Tensor, offset: int) -> None:
        """Give the sums to the cache layer; without a cache they are this forward pass's and replace the last one's."""
        if layer is None:
            self.store = ScoreStore()
            self.store.add(sums)
        else:
            layer.add_scores(sums, offset)
            layer.score_store.path = self.path
            self.store = layer.score_store

    def layer(self, module) -> Any:
        """Return the cache layer of this forward pass, one that keeps scores, or None."""
        cache = self.cache
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if self.is_cross else cache.self_attention_cache
        if cache is None or module.layer_idx >= len(cache.layers):
            return None
        return keep_scores(cache.layers, module.layer_idx)


@torch.compiler.disable  # scores outlive a call and grow with each one, which CUDA graphs' memory cannot do
def attention_with_kept_scores(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, *, is_causal: bool | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attend as transformers' attention functions do, and give the cache layer the sums that it asks for.

    Returns:
        output [B, M, Hq, Dv], and by request weights [B, Hq, M, N] in query's dtype or column sums [B, Hq, 1, N] fp32.

    Raises:
        RuntimeError, ValueError: the module was not prepared, or asks for what the kernels cannot do.
    """
    watch = getattr(module, WATCH, None)
    if watch is None:
        raise RuntimeError(f"{type(module).__name__} has not been prepared: call replace_attention_with_flash(model)")
    watch.was_called = True
    biases = [name for name in _BIASES if kwargs.get(name) is not None]
    if biases:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(biases)}, which attention with scores cannot apply"
        )

    n_q, width = query.shape[2], key.shape[2]
    layer = watch.layer(module)
    n_k, offset = (width, 0) if layer is None or watch.is_cross else layer.span(width)
    key, value = key[:, :, :n_k], value[:, :, :n_k]
    evicts = hasattr(layer, "visible_keys")
    if evicts and layer is not None:
        sight = Sight(True, None, layer.visible_keys(new_tokens(attention_mask, n_q)))
    else:
        if attention_mask is not None or is_causal is None:  # with a mask GPT-2 of 4.57 says False and means nothing
            is_causal = getattr(module, "is_causal", True)
        sight = read_mask(attention_mask, n_q, n_k, width, bool(is_causal) and not watch.is_cross, sliding_window)
    scale = _gpt2_scale(module, query) if scaling is None else scaling
    setting = Setting(sight.causal, scale, dropout, 0, sight.window, softcap, s_aux, sight.key_mask)

    returns_sums = watch.requests.weights_slot == "column_sums"
    keeps = watch.keeps_scores or evicts
    wanted = (layer.wanted_queries(n_q) if layer is not None else (0, n_q)) if keeps else None
    if keeps and layer is None and sight.causal and n_q != n_k:
        raise ValueError(
            f"{type(module).__name__} has {n_k} keys for {n_q} queries, but there is no transformers Cache with a "
            "layer for it where scores could be kept; let a module_filter of replace_attention_with_flash say so"
        )
    own_keys = sight.causal or (layer is None and n_q == n_k and not watch.is_cross)
    queries = (0, n_q) if wanted is None and returns_sums else wanted
    output, sums = masked_attention(
        *(query, key, value, setting, watch.requests.backend),
        own_keys=own_keys,
        queries=queries,
        per_query_head=returns_sums,
    )
    if wanted is not None and sums is not None:
        per_kv_head = sums.unflatten(1, (key.shape[1], -1)).sum(2) if returns_sums else sums
        watch.keep(layer, per_kv_head, offset)
    weights = None
    if returns_sums and sums is not None:
        weights = sums.unsqueeze(2)
    elif watch.requests.weights:
        weights = attention_weights(query, key, value, setting)
        weights = torch.nn.functional.pad(weights, (0, width - n_k))
    if layer is not None and hasattr(layer, "after_attention"):
        layer.after_attention(query, n_q)
    return output.transpose(1, 2).contiguous(), weights


def _gpt2_scale(module, query: Tensor) -> float:
    """Return the scale of a module that passes none: 1/sqrt(D), or what GPT-2 of transformers 4 is configured to."""
    scale = query.shape[3] ** -0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale
