"""The most memory that attention holds, against the sequence length: N² for the naive formula, N for the others."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import flash_attention_with_scores as library
from benchmark.cases import QWEN3_HEADS, Shape, hidden_keys, naive, sdpa
from benchmark.measure import OUT_OF_MEMORY, empty_cache, failure
from benchmark.peak import bytes_beyond
from benchmark.record import TimeLimit, within

COLUMNS = ("n", "operator", "pass", "dtype", "status", "beyond_mb", "scores_mb", "sum_error")
LENGTHS = {"cuda": tuple(2**i for i in range(10, 18)), "cpu": (256, 512, 1024, 2048)}
NAIVE = "naive PyTorch"


def attentions(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the ways to compute causal attention that are compared; their inputs may need gradients."""
    return {
        NAIVE: lambda: naive(q, k, v, hidden_keys(q, k))[0],
        "SDPA": lambda: sdpa(None, q, k, v, True),
        "attention": lambda: library.attention(q, k, v, True),
    }


def operators(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return the library's functions with sums, whose memory beyond inputs and output must not grow with N² either."""
    attend = (q, k, v, True)
    return {
        "row sum": lambda: library.attention_with_row_sum(*attend),
        "column sum": lambda: library.attention_with_col_sum(*attend),
        "softmax column sum": lambda: library.attention_with_softmax_col_sum(*attend),
        "stats": lambda: library.attention_with_stats(*attend),
    }


def memory_rows(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    limit: TimeLimit,
    say: Callable[[str], None],
    find: Callable[..., dict[str, Callable]] = attentions,
    heads: dict = QWEN3_HEADS,
) -> Iterator[dict]:
    """Measure forward passes, forward and backward passes together, and at the greatest length the sums.

    A method that ran out of memory at one length is not tried at a longer one.
    """
    too_long = set()
    for n in within(limit, lengths, say):
        q, k, v = Shape(**heads, n=n).tensors(dtype, device=device)
        calls = {("forward", name): partial(_as_tuple, call) for name, call in find(q, k, v).items()}
        if n == max(lengths):
            calls |= {("forward", name): call for name, call in operators(q, k, v).items()}
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        grad = torch.randn_like(q)
        calls |= {("backward", name): partial(_with_grads, call, leaves, grad) for name, call in find(*leaves).items()}
        for (direction, name), call in calls.items():
            scores_mb = heads["n_heads"] * n * n * q.element_size() / 1e6
            row = {"n": n, "operator": name, "pass": direction, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"scores_mb": scores_mb}
            if (direction, name) in too_long:
                yield row | {"status": "out of memory at a shorter length"}
                continue
            try:
                if n == lengths[0]:
                    call()  # libraries take their workspace once
                row |= {"beyond_mb": bytes_beyond(call, device) / 1e6, "status": "ok"}
                if name == "softmax column sum":  # each of the group's rows gives away a weight of 1
                    expected = n * heads["n_heads"] / heads["n_kv_heads"]
                    row["sum_error"] = (call()[1].double().sum(-1) - expected).abs().max().item() / expected
            except Exception as error:
                row["status"] = failure(error)
                too_long |= {(direction, name)} if row["status"] == OUT_OF_MEMORY else set()
            empty_cache()
            yield row


def _as_tuple(call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    return (call(),)


def _with_grads(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients."""
    output = call()
    return output, *torch.autograd.grad(output, leaves, grad)
