"""Attention of a Hugging Face model that keeps cumulative scores, beside eager attention that returns its weights."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from benchmark.measure import captured, empty_cache, failure, median_ms
from benchmark.peak import bytes_beyond
from benchmark.record import TimeLimit, within
from flash_attention_with_scores.huggingface import (
    NAME,
    get_all_cumulative_scores,
    replace_attention_with_flash,
    restore_attention,
)

LENGTHS = {"cuda": (512, 1024, 2048, 3000, 4096, 16384), "cpu": (256, 512, 1024)}
GRAPHS = 8192  # the longest that CUDA graphs are timed for: beyond, Python takes no share, and memory is scarce
COLUMNS = ("n", "dtype", "status", "eager_ms", "ours_ms", "speedup", "eager_mb", "ours_mb", "memory_ratio")
COLUMNS += ("eager_layer_ms", "ours_layer_ms", "layer_speedup", "eager_call_ms", "ours_call_ms", "scores_error")


def one_layer(device: str, dtype: torch.dtype, n_heads: int, head_dim: int) -> LlamaForCausalLM:
    """Return a Llama of one layer of this width with hardly any MLP, on eager attention."""
    config = LlamaConfig(
        hidden_size=n_heads * head_dim, intermediate_size=64, num_hidden_layers=1, num_attention_heads=n_heads,
        vocab_size=64, max_position_embeddings=32768, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype).eval()


def attention_calls(model: LlamaForCausalLM, n: int) -> dict[str, Callable[[], tuple[Tensor, Tensor | None]]]:
    """Return the attention functions that the layer calls, ready with q, k and v: with weights, and with sums."""
    module, like = model.model.layers[0].self_attn, next(model.parameters())
    q, k, v = torch.randn(3, 1, module.config.num_attention_heads, n, module.head_dim).to(like)
    hidden = torch.full((n, n), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device).triu(1)[None, None]
    ours = ALL_ATTENTION_FUNCTIONS[NAME]
    return {
        "eager": lambda: eager_attention_forward(module, q, k, v, hidden, scaling=module.scaling),
        "ours": lambda: ours(module, q, k, v, None, scaling=module.scaling, is_causal=True),
    }


@torch.no_grad()
def huggingface_rows(
    lengths: tuple[int, ...], device: str, limit: TimeLimit, say: Callable[[str], None], n_heads: int, head_dim: int
) -> Iterator[dict]:
    """Check the scores, then time both attention functions and a forward pass of the layer with each.

    `ms` is the GPU's time (replays of a CUDA graph, up to N = GRAPHS), `call_ms` that of calls from Python, `layer_ms`
    that of the whole layer with its projections, from Python; `mb` is the most memory beyond inputs and output.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = one_layer(device, dtype, n_heads, head_dim)
    for n in within(limit, lengths, say):
        row = {"n": n, "dtype": str(dtype).removeprefix("torch."), "status": "ok"}
        try:
            row |= _measured(model, n, device)
        except Exception as error:
            row["status"] = failure(error)
        restore_attention(model)
        empty_cache()
        yield row


def _measured(model: LlamaForCausalLM, n: int, device: str) -> dict:
    ids = torch.randint(0, 64, (1, n), device=device)
    weights = model(ids, output_attentions=True, use_cache=False).attentions[0]
    row = {"eager_layer_ms": median_ms(lambda: model(ids, output_attentions=True, use_cache=False), device=device)}
    replace_attention_with_flash(model)
    model(ids, use_cache=False)
    (scores,) = get_all_cumulative_scores(model).values()
    row |= {"scores_error": _relative_error(scores, weights), "eps": torch.finfo(weights.dtype).eps}
    row["right"] = row["scores_error"] < 4 * row["eps"]  # eager attention rounds each weight to the model's dtype
    del weights
    row["ours_layer_ms"] = median_ms(lambda: model(ids, use_cache=False), device=device)
    for name, call in attention_calls(model, n).items():
        row[f"{name}_mb"] = bytes_beyond(lambda call=call: call()[:1], device) / 1e6
        empty_cache()
        row[f"{name}_call_ms"] = median_ms(call, device=device)
        by_graph = device != "cpu" and n <= GRAPHS
        row[f"{name}_ms"] = median_ms(captured(call)) if by_graph else row[f"{name}_call_ms"]
    row["speedup"] = row["eager_ms"] / row["ours_ms"]
    row["layer_speedup"] = row["eager_layer_ms"] / row["ours_layer_ms"]
    row["memory_ratio"] = row["eager_mb"] / row["ours_mb"]
    return row


def _relative_error(scores: Tensor, weights: Tensor) -> float:
    """Return the largest difference of scores from the column sums of eager weights, as a share of the largest sum."""
    expected = weights.sum(2, dtype=torch.float64)
    return ((scores.double() - expected).abs().max() / expected.max()).item()
