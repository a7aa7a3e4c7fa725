"""Switches a model's attention over and back, and reads the scores that its modules and caches keep."""

import inspect
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface

from ..validation import check_choice
from .attention import WATCH, Requests, Watch, attention_with_kept_scores
from .masks import make_mask
from .score_keeping import ScoreKeeping

NAME = "attn_with_scores"  # with "flash" in it transformers would take it for FlashAttention-2
WEIGHTS_SLOTS = ("weights", "column_sums")
_REPLACED = "_attn_with_scores_replaced"  # the attribute of a model that says how to go back

AttentionInterface.register(NAME, attention_with_kept_scores)
AttentionMaskInterface.register(NAME, make_mask)


class _Replaced:
    """What was changed, to be put back."""

    def __init__(self, model: PreTrainedModel):
        self.implementations = _implementations(model)
        generation = getattr(model, "generation_config", None)
        self.disable_compile = getattr(generation, "disable_compile", None)
        self.hooks = []


def replace_attention_with_flash(
    model: PreTrainedModel,
    module_filter: Callable[[str, nn.Module], bool] | None = None,
    *,
    weights_slot: str = "weights",
    backend: str | None = None,
) -> PreTrainedModel:
    """Make a model's attention modules run FlashAttention and keep the attention that each key gets.

    Args:
        model: any model whose attention goes through transformers' AttentionInterface.
        module_filter: (module path, attention module) -> whether to keep its scores. The others run FlashAttention as
            well, since a model has one attention function, but keep nothing.
        weights_slot: what modules return as attention weights. "weights": [B, H, M, N], and only by request
            (output_attentions=True). "column_sums": always fp32 [B, H, 1, N], the weights summed over the queries, for
            code that does `attentions.sum(2)`, such as kvpress' ObservedAttentionPress.
        backend: as in `attention`.

    Returns:
        The model, changed in place; `restore_attention` changes it back. A second call replaces the first.

    Raises:
        TypeError, ValueError: this is no transformers model, or attention modules of it cannot be switched.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    check_choice("weights_slot", weights_slot, WEIGHTS_SLOTS)
    keeps = module_filter or (lambda name, module: True)
    modules = {name: module for name, module in model.named_modules() if _asks_the_interface(module)}
    _check_supported(model, modules, keeps)
    restore_attention(model)
    replaced = _Replaced(model)
    setattr(model, _REPLACED, replaced)
    model.set_attn_implementation(NAME)
    stayed = [name for name, module in modules.items() if module.config._attn_implementation != NAME]
    if stayed:
        restore_attention(model)
        raise ValueError(f"{type(model).__name__} did not let its attention be switched: {', '.join(stayed)}")

    requests = Requests(weights_slot, backend)
    for submodel in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        replaced.hooks += _hook(submodel, requests.begin, requests.end)
    for name, module in modules.items():
        watch = Watch(name, requests, bool(keeps(name, module)))
        setattr(module, WATCH, watch)
        replaced.hooks += _hook(module, watch.begin, watch.check_called)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.disable_compile = True  # hooks and scores that grow do not go into CUDA graphs
    return model


def restore_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Put the model's own attention back; scores are forgotten. Does nothing to a model that was not changed."""
    replaced = getattr(model, _REPLACED, None)
    if replaced is None:
        return model
    for hook in replaced.hooks:
        hook.remove()
    model.set_attn_implementation(replaced.implementations)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.disable_compile = replaced.disable_compile
    for module in model.modules():
        if hasattr(module, WATCH):
            delattr(module, WATCH)
    delattr(model, _REPLACED)
    return model


def get_all_cumulative_scores(model: PreTrainedModel, cache: Cache | None = None) -> dict[str, Tensor]:
    """Return the attention that each key has had, by module path.

    Args:
        model: changed by `replace_attention_with_flash`.
        cache: whose keys; None means the cache that each module used last, or with use_cache=False the last forward
            pass. The last scores outlive their cache: they are there after `generate`.

    Returns:
        {"model.layers.0.self_attn": [B, Hk, N], ...} fp32: softmax weights summed over the head group and over all
        queries that are no padding. N is the number of tokens that have been fed (`generate` never feeds the last one),
        also where a sliding layer has dropped keys. Modules that keep no scores or have none yet are left out.

    Raises:
        ValueError: the model was not changed.
    """
    stores = {name: _store(module, cache) for name, module in _watched(model)}
    return {name: store.scores for name, store in stores.items() if store is not None and store.scores is not None}


def reset_cumulative_scores(model: PreTrainedModel, cache: Cache | None = None) -> None:
    """Set the scores that `get_all_cumulative_scores` would return to nothing; keys stay in the cache.

    Raises:
        ValueError: the model was not changed.
    """
    for _, module in _watched(model):
        store = _store(module, cache)
        if store is not None:
            store.clear()


def _store(module, cache: Cache | None):
    watch = getattr(module, WATCH)
    if cache is None:
        return watch.store
    has_two = isinstance(cache, EncoderDecoderCache)
    caches = [cache.self_attention_cache, cache.cross_attention_cache] if has_two else [cache]
    stores = (layer.score_store for part in caches for layer in part.layers if isinstance(layer, ScoreKeeping))
    return next((store for store in stores if store.path == watch.path), None)


def _watched(model) -> list[tuple[str, nn.Module]]:
    if getattr(model, _REPLACED, None) is None:
        raise ValueError("the model keeps no scores: call replace_attention_with_flash(model) first")
    return [(name, module) for name, module in model.named_modules() if hasattr(module, WATCH)]


def _hook(module: nn.Module, begin, end) -> list:
    return [
        module.register_forward_pre_hook(begin, with_kwargs=True),
        module.register_forward_hook(end, always_call=True),
    ]


def _asks_the_interface(module: nn.Module) -> bool:
    """Tell whether a module's forward looks its attention function up, where AttentionInterface puts it."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _check_supported(model: PreTrainedModel, modules: Mapping[str, nn.Module], keeps) -> None:
    kind = type(model).__name__
    paths = [f"{name}." for name in modules]
    own = [
        name
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__
        and name not in modules
        and not any(path.startswith(f"{name}.") or name.startswith(path) for path in paths)
        and keeps(name, module)
    ]
    if own:
        raise ValueError(
            f"{kind} has attention of its own ({', '.join(own[:3])}{', …' if len(own) > 3 else ''}) that does not go "
            "through transformers' AttentionInterface, so it cannot be replaced; a module_filter that is False for "
            "such modules leaves them as they are"
        )
    if not modules:
        raise ValueError(f"{kind} has no attention that goes through transformers' AttentionInterface to be replaced")
    shared = [name for name, m in modules.items() if getattr(m, "is_kv_shared_layer", False) and keeps(name, m)]
    if shared:
        raise ValueError(f"{kind} has modules that share another's keys, leave them out by module_filter: {shared}")


def _implementations(model: PreTrainedModel) -> dict[str, str | None]:
    """Return the attention implementation of the model ("") and of its sub-configurations, as transformers takes it."""
    configs = {"": model.config} | {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    return {key: config._attn_implementation for key, config in configs.items() if config is not None}
