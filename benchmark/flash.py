"""Forward, backward and end-to-end latency over sequence lengths and head dimensions, as called from Python.

The figures are what a caller waits for: at short lengths that is the time of Python and of launches, not the GPU's.
"""

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmark.cases import Shape, causal_mask, hidden_keys, naive, sdpa
from benchmark.measure import OUT_OF_MEMORY, empty_cache, failure, median_ms
from benchmark.oracle import GradientOracle
from benchmark.peak import bytes_beyond
from benchmark.record import TimeLimit, within
from stage4_backward.autograd import FlashAttentionPyTorchFunc, FlashAttentionTritonFunc

KEY = ("n", "head_dim", "dtype", "heads", "method")
PASSES = ("forward", "backward", "end_to_end")
COLUMNS = (*KEY, "status", "beyond_mb", *(f"{name}_ms" for name in PASSES), *(f"{name}_speedup" for name in PASSES))
PLAIN = "plain PyTorch"
_OVERHEAD_MS = 1.0  # a call that is shorter says nothing about how its time grows
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Sweep(NamedTuple):
    """What is measured, and how long."""

    lengths: tuple[int, ...] = tuple(2**i for i in range(7, 17))
    head_dims: tuple[int, ...] = (16, 32, 64, 128)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    heads: int = 1
    warmup_ms: float = 5
    rep_ms: float = 20
    cell_seconds: float = 0.5  # the longest that one forward and backward pass may be expected to take
    flex_head_dims: tuple[int, ...] = (64, 128)  # FlexAttention is compiled anew for each, which takes seconds


GPU_SWEEP = Sweep()
QUICK = Sweep((512, 4096, 16384), (64, 128), ("bfloat16",), flex_head_dims=(128,))
CPU_SWEEP = Sweep((128, 256, 512, 1024), (64,), ("float32",), warmup_ms=20, rep_ms=100, cell_seconds=3)


def methods(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Attend]]:
    """Return {name: prepare}; prepare gets q, k and v and returns what is timed."""
    tiled = {"ours, tiled PyTorch": lambda q, k, v: lambda q, k, v: FlashAttentionPyTorchFunc.apply(q, k, v, True)}
    peers = {PLAIN: _plain, "SDPA": lambda q, k, v: lambda q, k, v: sdpa(None, q, k, v, True)}
    if device == "cpu":
        return peers | tiled
    triton = {"ours, Triton": lambda q, k, v: lambda q, k, v: FlashAttentionTritonFunc.apply(q, k, v, True)}
    return peers | triton | tiled | {"FlexAttention": _flex}


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Attend:
    hidden = hidden_keys(q, k)
    return lambda q, k, v: naive(q, k, v, hidden)[0]


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Attend:
    """Prepare FlexAttention with its mask made beforehand, compiled for any length."""
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = create_block_mask(causal_mask, None, None, q.shape[2], k.shape[2], device=q.device)
    return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=block_mask)


_flex_cache: list[Callable] = []


def _compiled_flex() -> Callable:
    """Return the compiled function; `new_variant` makes it anew."""
    from torch.nn.attention.flex_attention import flex_attention

    if not _flex_cache:
        torch._functorch.config.donated_buffer = False  # the backward pass alone is timed again and again
        _flex_cache.append(torch.compile(flex_attention, dynamic=True))
    return _flex_cache[0]


def new_variant() -> None:
    """Forget what was compiled: past its limit of recompilations FlexAttention would run uncompiled."""
    _flex_cache.clear()
    torch._dynamo.reset()


def flash_rows(
    sweep: Sweep,
    device: str,
    finished: list[dict],
    limit: TimeLimit,
    say: Callable[[str], None],
    find: Callable[[str], dict] = methods,
) -> Iterator[dict]:
    """Check and time every cell that is not finished; what cannot be measured becomes a row that says why.

    A method's time is expected to grow with the square of the length, so that a hopeless cell is known beforehand.
    """
    done = {key_of(row): row for row in finished}
    cells = list(product(sweep.dtypes, sweep.head_dims, sweep.lengths))
    variant = None
    for dtype, head_dim, n in within(limit, cells, say):
        if variant != (dtype, head_dim):
            variant, earlier = (dtype, head_dim), {}
            new_variant()
        base = {"n": n, "head_dim": head_dim, "dtype": dtype, "heads": sweep.heads}
        prepare = find(device)
        if "FlexAttention" in prepare and head_dim not in sweep.flex_head_dims:
            prepare.pop("FlexAttention")
        oracle = None
        for name in within(limit, prepare, say):
            key = key_of(base | {"method": name})
            tried = earlier.setdefault(name, [])
            if key in done:
                tried.append(done[key])
                continue
            row = base | {"method": name, "status": _hopeless(tried, n, sweep.cell_seconds)}
            if not row["status"]:
                try:
                    if oracle is None:
                        oracle = _Inputs(Shape(1, sweep.heads, sweep.heads, n, head_dim, True), dtype, device)
                    row |= oracle.measure(prepare[name], sweep, device)
                except Exception as error:
                    row["status"] = failure(error)
            plain = row if name == PLAIN else done.get(key_of(base | {"method": PLAIN}), {})
            for pass_name in PASSES:
                if f"{pass_name}_ms" in row and f"{pass_name}_ms" in plain:
                    row[f"{pass_name}_speedup"] = plain[f"{pass_name}_ms"] / row[f"{pass_name}_ms"]
            done[key] = row
            tried.append(row)
            empty_cache()
            yield row


def key_of(row: dict) -> tuple[str, ...]:
    """Return what tells one cell from another."""
    return tuple(str(row[name]) for name in KEY)


def _hopeless(tried: list[dict], n: int, seconds: float) -> str:
    """Say, from the cells at shorter lengths, why this one is not worth trying; "" if it is."""
    measured = [row for row in tried if "end_to_end_ms" in row]
    failed = [row["status"] for row in tried if row["status"] != "ok" and not row["status"].startswith("skipped")]
    if OUT_OF_MEMORY in failed or len(failed) > 1:
        return f"skipped: at shorter lengths {failed[-1]}"
    if not measured or measured[-1]["end_to_end_ms"] < _OVERHEAD_MS:
        return ""
    expected = measured[-1]["end_to_end_ms"] / 1000 * (n / measured[-1]["n"]) ** 2
    return f"skipped: would take {expected:.1f} s" if expected > seconds else ""


class _Inputs:
    """Inputs of one cell and their oracle, shared by its methods."""

    def __init__(self, shape: Shape, dtype: str, device: str):
        self.qkv = [x.requires_grad_() for x in shape.tensors(getattr(torch, dtype), device=device)]
        self.grad = torch.randn_like(self.qkv[0])
        self.oracle = GradientOracle(*self.qkv, self.grad, True)

    def measure(self, prepare: Callable, sweep: Sweep, device: str) -> dict:
        """Return the status of a method and, if it is right, its three times."""
        attend = prepare(*self.qkv)

        def backward(output):
            return torch.autograd.grad(output, self.qkv, self.grad, retain_graph=True)

        output = attend(*self.qkv)
        if not self.oracle.agrees(output.detach(), backward(output)):
            return {"status": "wrong"}
        start = time.perf_counter()
        self._both(attend)[0].sum().item()  # waits
        slow = time.perf_counter() - start > 0.1
        calls = {
            "forward": lambda: attend(*self.qkv),
            "backward": lambda: backward(output),
            "end_to_end": lambda: self._both(attend),
        }
        timer = _few_calls_ms if slow else lambda call: median_ms(call, sweep.warmup_ms, sweep.rep_ms, device)
        beyond = {"beyond_mb": bytes_beyond(lambda: self._both(attend), device) / 1e6}
        return {"status": "ok"} | beyond | {f"{name}_ms": timer(call) for name, call in calls.items()}

    def _both(self, attend: Attend) -> tuple[Tensor, ...]:
        """Return the output and the gradients."""
        output = attend(*self.qkv)
        return output, *torch.autograd.grad(output, self.qkv, self.grad)


def _few_calls_ms(call: Callable[[], tuple]) -> float:
    """Return the shortest of two calls by the wall's clock: for calls that take long, where that is exact enough."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        result = call()
        (result[0] if isinstance(result, tuple) else result).sum().item()  # waits
        times.append(1000 * (time.perf_counter() - start))
    return min(times)
