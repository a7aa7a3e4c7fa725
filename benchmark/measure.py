"""Timing: on a GPU by its own clock, on a CPU by the wall's."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

OUT_OF_MEMORY = "out of memory"


def median_ms(call: Callable[[], object], warmup_ms: float = 25, rep_ms: float = 100, device: str = "cuda") -> float:
    """Return the median time of a call in milliseconds; on a GPU with the L2 cache cleared before each."""
    if device == "cpu":
        return _median_wall_ms(call, warmup_ms, rep_ms)
    import triton

    return triton.testing.do_bench(call, warmup=warmup_ms, rep=rep_ms, return_mode="median")


def _median_wall_ms(call: Callable[[], object], warmup_ms: float, rep_ms: float) -> float:
    """Call for `warmup_ms`, then for `rep_ms`, thrice at least; return the median."""
    start = time.perf_counter()
    call()
    while 1000 * (time.perf_counter() - start) < warmup_ms:
        call()
    times, start = [], time.perf_counter()
    while len(times) < 3 or 1000 * (time.perf_counter() - start) < rep_ms:
        before = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - before))
    return statistics.median(times)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Capture a call in a CUDA graph; its replay takes the GPU's time, and none of Python's."""
    call()  # compiles
    torch.cuda.synchronize()
    empty_cache()  # a graph has memory of its own, and cannot use what the call has left
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def side_by_side(calls: dict[str, Callable[[], object]], rounds: int = 3, **kwargs) -> dict[str, list[float]]:
    """Time several calls in turn, `rounds` times over, so that drift of the clocks touches all alike."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(median_ms(call, **kwargs))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Summarise the medians of several rounds."""
    return {"ms": statistics.median(times), "min": min(times), "max": max(times)}


def ceilings(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Measure what this machine can do at best: a large matrix product, and a copy (bytes read and written)."""
    on_gpu = device != "cpu"
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product_ms = median_ms(lambda: a @ b, device=device)
    return {"matmul_tflops": 2 * side**3 / product_ms / 1e9, "copy_gbs": copy_rate(device)}


def copy_rate(device: str) -> float:
    """Return how many GB/s a large copy reads and writes."""
    source = torch.empty(2 ** (30 if device != "cpu" else 26), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device=device) / 1e6


def failure(error: Exception) -> str:
    """Return what a cell says where a call failed: "out of memory", or the error's first line."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "out of memory" in text:
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:160]}"


def n_bytes(*tensors: Tensor) -> int:
    """Return the bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


def empty_cache() -> None:
    """Give memory that no tensor uses back to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
