"""Finds tile sizes: compiles every candidate ahead of time, prunes what does not fit, times the rest on the GPU."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from rich.progress import track

from benchmark.cases import FORWARD_SHAPES, SHARED_MEMORY_LIMIT
from benchmark.measure import is_right, median_ms
from stage2_triton_forward import launch
from stage2_triton_forward.tile_config import TileConfig

ROOT = Path(__file__).parent.parent
SHAPES = [shape for shape in FORWARD_SHAPES if shape.n >= 4096]
TILES = {
    64: [(64, 64), (64, 128), (128, 64), (128, 128)],
    128: [(64, 64), (64, 128), (128, 32), (128, 64), (128, 128)],
    256: [(64, 32), (64, 64), (128, 32), (128, 64)],
}


def candidates(head_dim: int) -> list[TileConfig]:
    """Return every config worth compiling for a head dimension."""
    return [
        TileConfig(m, n, warps, stages)
        for (m, n), warps, stages in product(TILES[head_dim], (4, 8), (2, 3, 4))
        if (warps == 4) or m == 128
    ]


def compile_all(configs: list[TileConfig], head_dim: int, causal: bool, dtype: torch.dtype, workers: int = 12) -> dict:
    """Compile the candidates in processes of their own; return what each needs, and leave Triton's cache warm.

    Returns:
        {config: resources or None where it did not compile}
    """
    name = str(dtype).removeprefix("torch.")

    def compile_some(some):
        command = [sys.executable, "-m", "benchmark.ahead_of_time", "--configs", json.dumps(some)]
        command += ["--head-dim", str(head_dim), "--dtype", name, *(["--causal"] if causal else [])]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return [json.loads(line) for line in run.stdout.splitlines()]

    with ThreadPoolExecutor(workers) as pool:
        results = [
            row for rows in pool.map(compile_some, [configs[i::workers] for i in range(workers)]) for row in rows
        ]
    return {TileConfig(*row["config"]): row["resources"] for row in results}


def search(dtype: torch.dtype = torch.bfloat16, shared_limit: int = SHARED_MEMORY_LIMIT[90]) -> list[dict]:
    """Time every candidate that compiles, fits and does not spill much, on every shape; return the rows, best first."""
    rows = []
    choose = launch.forward_config
    for shape in track(SHAPES, "search"):
        configs = candidates(shape.head_dim)
        resources = compile_all(configs, shape.head_dim, shape.causal, dtype)
        q, k, v = shape.tensors(dtype)
        for config in configs:
            needs = resources.get(config)
            if needs is None or needs["shared_bytes"] > shared_limit or needs["stack_bytes"] > 256:
                continue
            launch.forward_config = lambda *args, config=config: config
            try:
                output, _ = launch.forward(q, k, v, shape.causal)
                right = is_right(output, q, k, v, shape.causal)
                ms = median_ms(lambda q=q, k=k, v=v, c=shape.causal: launch.forward(q, k, v, c), 10, 40)
            finally:
                launch.forward_config = choose
            rows.append(
                {
                    "shape": str(shape),
                    "config": list(config),
                    "ms": ms,
                    "tflops": shape.flops / ms / 1e9,
                    "right": right,
                }
                | needs
            )
    return sorted(rows, key=lambda row: (row["shape"], row["ms"]))
