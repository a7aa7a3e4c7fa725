"""What a call costs before the GPU begins: Python and launches, which short kernels and decoding feel most."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attention_with_scores as library
from benchmark.measure import median_ms, spread

SHAPE = {"batch": 1, "n_heads": 8, "n_kv_heads": 2, "n": 256, "head_dim": 64}  # shorter on the GPU than in Python
DECODING = {"batch": 1, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128}
DECODE_LENGTHS = (8192, 32768)
AS_CALLED = (1024, 2048)
Call = Callable[[], object]


def tensors(batch, n_heads, n_kv_heads, n, head_dim, *, n_q=None, dtype=torch.float16) -> list[Tensor]:
    """Draw q, k and v."""
    draw = partial(torch.randn, device="cuda", dtype=dtype)
    q = draw(batch, n_heads, n if n_q is None else n_q, head_dim)
    return [q, *(draw(batch, n_kv_heads, n, head_dim) for _ in range(2))]


def operators(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> dict[str, Call]:
    """Return a call of every operator."""
    attend, split = (q, k, v), 3 * k.shape[2] // 4
    cross = {"split": split, "causal": causal}
    return {
        "attention": lambda: library.attention(*attend, causal),
        "scores": lambda: library.attention_with_scores(*attend, causal),
        "scores alone": lambda: library.compute_attention_scores(q, k, causal),
        "row sum": lambda: library.attention_with_row_sum(*attend, causal),
        "column sum": lambda: library.attention_with_col_sum(*attend, causal),
        "softmax column sum": lambda: library.attention_with_softmax_col_sum(*attend, causal),
        "cross-token qk": lambda: library.attention_cross_token_qk_sum(*attend, **cross),
        "cross-token softmax": lambda: library.attention_cross_token_softmax_sum(*attend, **cross),
        "statistics": lambda: library.attention_with_stats(*attend, causal),
    }


def peers(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> dict[str, Call]:
    """Return PyTorch's own attention, as it chooses and as FlashAttention-2."""

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa()

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return {"SDPA": sdpa, "SDPA, FlashAttention-2": flash}


def host_us(calls: dict[tuple[str, str], Call], repeats: int = 100, rounds: int = 30) -> dict[tuple[str, str], float]:
    """Return the time after which each call comes back, in microseconds: the shortest mean of many rounds.

    A round takes every call in turn, so that what else the machine does for a while spoils none of them altogether.
    """
    shortest = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            shortest[name] = min(shortest[name], (time.perf_counter() - start) / repeats * 1e6)
    torch.cuda.synchronize()
    return shortest


def forward_and_backward(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> Call:
    """Return a training step's share of attention."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn_like(attend(*inputs))
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def host_rows() -> Iterator[dict]:
    """Time every operator on a shape that the GPU has done with before Python has."""
    qkv = tensors(**SHAPE)

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def ours(q, k, v):
        return library.attention(q, k, v, True)

    ready = {("plain", name): call for name, call in (peers(*qkv) | operators(*qkv)).items()}
    attends = {"SDPA": sdpa, "attention": ours}
    ready |= {("forward and backward", name): forward_and_backward(f, qkv) for name, f in attends.items()}
    for n in DECODE_LENGTHS:
        token = tensors(**DECODING, n=n, n_q=1)
        mine = operators(*token) | {"SDPA": peers(*token, causal=False)["SDPA"]}
        ready |= {(f"decoding, N = {n}", name): mine[name] for name in ("SDPA", "attention", "softmax column sum")}
    yield from _timed(ready)
    compiled = {}  # last: what the compiler leaves behind slows everything down
    for name, attend in attends.items():
        compiled["compiled", name] = partial(torch.compile(attend, fullgraph=True), *qkv)
        compiled["compiled, forward and backward", name] = forward_and_backward(
            torch.compile(attend, fullgraph=True), qkv
        )
    yield from _timed(compiled)


def _timed(calls: dict[tuple[str, str], Call]) -> Iterator[dict]:
    for call in calls.values():
        for _ in range(20):
            call()
    for (way, name), us in host_us(calls).items():
        yield {"way": way, "name": name, "host_us": us, "called_us": 1e3 * median_ms(calls[way, name], 10, 40)}


def called_rows() -> Iterator[dict]:
    """Time every operator as called from Python, its launches not captured, at lengths where the host may be slower."""
    for n in AS_CALLED:
        qkv = tensors(1, 32, 8, n, 128)
        for name, call in (peers(*qkv) | operators(*qkv)).items():
            yield {"n": n, "name": name, **spread([median_ms(call, 10, 50) for _ in range(3)])}
