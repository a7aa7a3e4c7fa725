"""Finds tile sizes: compiles every candidate ahead of time, prunes what spills or does not fit, times the rest."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

from benchmark.cases import FORWARD_SHAPES, SHARED_MEMORY_LIMIT, Shape
from benchmark.measure import failure, median_ms
from benchmark.oracle import output_is_right
from benchmark.record import TimeLimit, within
from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward import launch
from stage2_triton_forward.tile_config import TileConfig, choose

ROOT = Path(__file__).parent.parent
SHAPES = [shape for shape in FORWARD_SHAPES if shape.n >= 4096]
TILES = {
    64: [(64, 64), (64, 128), (128, 64), (128, 128)],
    128: [(64, 64), (64, 128), (128, 32), (128, 64), (128, 128)],
    256: [(64, 32), (64, 64), (128, 32), (128, 64)],
}
OF_A_HOOK = [  # what `search_config` tries: hooks need registers of their own
    TileConfig(64, 32, 4, 3),
    TileConfig(64, 64, 4, 2),
    TileConfig(64, 64, 4, 3),
    TileConfig(128, 64, 4, 2),
    TileConfig(128, 64, 8, 2),
]


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

    shares = [configs[i::workers] for i in range(workers) if configs[i::workers]]
    with ThreadPoolExecutor(workers) as pool:
        results = [row for rows in pool.map(compile_some, shares) for row in rows]
    return {TileConfig(*row["config"]): row["resources"] for row in results}


def reason_to_prune(needs: dict | None, shared_limit: int) -> str | None:
    """Say why a config is not worth timing, from what the compiler made of it; None if it is."""
    if needs is None:
        return "does not compile"
    if needs["shared_bytes"] > shared_limit:
        return f"needs {needs['shared_bytes']} bytes of shared memory, there are {shared_limit}"
    return f"spills {needs['stack_bytes']} bytes" if needs["stack_bytes"] else None


def search_rows(
    limit: TimeLimit,
    say: Callable[[str], None],
    pruned: list[dict],
    shapes: list[Shape] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
    shared_limit: int = SHARED_MEMORY_LIMIT[90],
    compiled: Callable[..., dict] = compile_all,
    device: str = "cuda",
    measure: Callable[..., float] = median_ms,
) -> Iterator[dict]:
    """Time every candidate that compiles, fits and does not spill, on every shape; `pruned` gets the others."""
    resources = {}
    for shape in within(limit, shapes, say):
        variant = shape.head_dim, shape.causal
        if variant not in resources:
            configs = candidates(shape.head_dim)
            resources[variant] = compiled(configs, shape.head_dim, shape.causal, dtype)
            for config in configs:
                reason = reason_to_prune(resources[variant].get(config), shared_limit)
                if reason:
                    mask = "causal" if shape.causal else "full"
                    pruned.append({"head_dim": shape.head_dim, "mask": mask, "config": list(config), "reason": reason})
            say(f"compiled {len(configs)} configs for D = {shape.head_dim}, {len(pruned)} pruned so far")
        q, k, v = shape.tensors(dtype, device=device)
        setting = Setting(shape.causal)
        for config, needs in resources[variant].items():
            if reason_to_prune(needs, shared_limit) or limit.reached():
                continue
            row = {"shape": str(shape), "config": list(config)}
            try:
                with choose(forward=config):
                    output, _ = launch.forward(q, k, v, setting)
                    right = output_is_right(output, q, k, v, shape.causal)
                    ms = measure(lambda q=q, k=k, v=v, s=setting: launch.forward(q, k, v, s), 10, 40)
            except Exception as error:
                pruned.append(row | {"reason": failure(error)})
                continue
            if right:
                yield row | {"ms": ms, "tflops": shape.flops / ms / 1e9, "right": right} | needs
            else:
                pruned.append(row | {"reason": "wrong answer"})


def table_rows(rows: list[dict]) -> list[str]:
    """Return, for each head dimension, the line of `tile_config.py` that the rows speak for.

    The best config is the one whose TFLOP/s, divided by the best of the shape, have the largest geometric mean over all
    shapes of the head dimension that it was timed on.
    """
    best, shares = {}, {}
    for row in rows:
        best[row["shape"]] = max(row["tflops"], best.get(row["shape"], 0))
    for row in rows:
        head_dim = int(row["shape"].split()[0].split(",")[-1])
        found = shares.setdefault(head_dim, {}).setdefault(tuple(row["config"]), {})
        found[row["shape"]] = row["tflops"] / best[row["shape"]]
    lines = []
    for head_dim, of_config in sorted(shares.items()):
        n_shapes = max(len(found) for found in of_config.values())
        means = {
            config: math.exp(sum(map(math.log, found.values())) / n_shapes)
            for config, found in of_config.items()
            if len(found) == n_shapes
        }
        config = max(means, key=means.get)
        arguments = ", ".join(repr(x) for x in (config if config[4:] not in ((), ("ieee",)) else config[:4]))
        share = f"{means[config]:.3f} of the best of each of {n_shapes} shapes"
        lines.append(f"plain=TileConfig({arguments}),  # D = {head_dim}: {share}")
    return lines


def search_config(
    call: Callable[[], object],
    loop: str,
    others: dict[str, TileConfig],
    trials: int,
    warmup: int,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> TileConfig | None:
    """Return the fastest config of one loop for a call, among a few; None where the tables' own is the fastest.

    Args:
        call: launches the loop.
        loop: "forward" or "column_sum".
        others: configs of other loops, in effect meanwhile.
        trials, warmup: how often to time the call, and how often to call it before.
        measure: the time of a call; None for a GPU's clock.
    """
    measure = measure or (lambda call: _fastest_ms(call, trials, warmup))
    with choose(**others):
        best, best_ms = None, measure(call)
    for config in OF_A_HOOK:
        try:
            with choose(**others, **{loop: config}):
                ms = measure(call)
        except Exception:  # too much shared memory, or a tile that the compiler cannot do
            continue
        if ms < best_ms:
            best, best_ms = config, ms
    return best


def _fastest_ms(call: Callable[[], object], trials: int, warmup: int) -> float:
    """Return the shortest of some timed calls."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(trials):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times)
