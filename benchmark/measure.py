"""Timing on a GPU, and where results go."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from course.grader import compare
from course.provenance import provenance
from stage1_pytorch_tiled.dense import naive_attention


def median_ms(call: Callable[[], object], warmup_ms: int = 25, rep_ms: int = 100) -> float:
    """Return the median time of a call in milliseconds, with the L2 cache cleared before each."""
    return triton.testing.do_bench(call, warmup=warmup_ms, rep=rep_ms, return_mode="median")


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Capture a call in a CUDA graph; its replay takes the GPU's time, and none of Python's."""
    call()  # compiles
    torch.cuda.synchronize()
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


def is_right(output: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, rows=64) -> bool:
    """Compare the last rows of an output with the float64 oracle, head by head (the whole matrix would not fit)."""
    group = q.shape[1] // k.shape[1]
    for head in {0, q.shape[1] - 1}:
        parts = (q[:1, head : head + 1, -rows:], k[:1, head // group, None], v[:1, head // group, None])
        oracle = naive_attention(*(x.double() for x in parts), causal=causal).output
        naive = naive_attention(*parts, causal=causal).output
        if not compare(output[:1, head : head + 1, -rows:], oracle, naive).ok:
            return False
    return True


def save(name: str, rows: list[dict], out: Path) -> Path:
    """Write rows with their provenance to `out`/`name`.json."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")
    return path
