"""Compiles every kernel for GPUs that need not be present, and reports registers, spills and shared memory.

`python -m benchmark.ahead_of_time --arch 80 90` prints one JSON object a line. It must run in its own process: Triton
decides at import whether kernels are interpreted.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmark.cases import SHARED_MEMORY_LIMIT
from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward import launch as stage2
from stage2_triton_forward.split_kv import attention_forward
from stage2_triton_forward.tile_config import TileConfig, choose
from stage3_scores_and_sums import launch as stage3
from stage3_scores_and_sums.column_sums import fold_columns, softmax_col_sum
from stage3_scores_and_sums.linear_sums import linear_col_sum, linear_row_sum
from stage4_backward.gradients import Gradients
from stage4_backward.launch import backward, describe_score_grads, through_columns
from stage4_backward.linear_grads import linear_col_sum_grads, linear_row_sum_grads

ROWS = torch.empty(1, 4, 256)  # a statistic of every query, such as the lse
COLUMNS = torch.empty(1, 2, 256)  # of every key
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@triton.jit
def add_up(acc, logits, weights, q_idx, k_idx):
    """Sum the weights: a reduction as a user would write it."""
    return acc + tl.sum(weights, 1)


REGION = {"q_begin": 192, "k_stop": 192}
SCORES_AND_SUMS = {  # stage 3, by the name of the case
    "with_scores": lambda q, k, s: stage3.attention_with_scores(q, k, k, s),
    "scores_alone": lambda q, k, s: stage3.compute_attention_scores(q, k, s),
    "row_sum_kahan": lambda q, k, s: stage3.attention_with_row_sum(q, k, k, s, algorithm="kahan"),
    "row_sum_linear": lambda q, k, s: linear_row_sum(q, k, s),
    "col_sum_linear": lambda q, k, s: linear_col_sum(q, k, s._replace(window=(100, None))),
    "col_sum_reverse": lambda q, k, s: stage3.attention_with_col_sum(q, k, k, s, algorithm="atomic_reverse"),
    "col_sum_round_robin": lambda q, k, s: stage3.attention_with_col_sum(q, k, k, s, algorithm="atomic_round_robin"),
    "softmax_col_sum": lambda q, k, s: softmax_col_sum(q, k, ROWS, s),
    "softmax_col_sum_window": lambda q, k, s: softmax_col_sum(
        *(q, k, ROWS), s._replace(window=(100, None), softcap=20.0)
    ),
    "softmax_cross": lambda q, k, s: softmax_col_sum(q, k, ROWS, s, **REGION),
    "softmax_cross_stored": lambda q, k, s: softmax_col_sum(q, k, ROWS, s, **REGION, stored=q.new_empty(1, 4, 64, 192)),
    "stats": lambda q, k, s: stage3.attention_with_stats(q, k, k, s),
    "fold_columns": lambda q, k, s: fold_columns(q, k, ROWS, s, add_up),
    "fold_rows": lambda q, k, s: stage3.fold_rows(q, k, ROWS, s, add_up),
}
GRADIENTS = {  # stage 4
    "backward": lambda q, k, s: backward(q, k, k, q, ROWS, Gradients(q), s),
    "backward_softcap": lambda q, k, s: backward(q, k, k, q, ROWS, Gradients(q), s._replace(softcap=20.0)),
    "backward_dropout": lambda q, k, s: backward(q, k, k, q, ROWS, Gradients(q), s._replace(dropout_p=0.1)),
    "backward_window": lambda q, k, s: backward(q, k, k, q, ROWS, Gradients(q), s._replace(window=(100, None))),
    "backward_scores": lambda q, k, s: backward(q, k, k, q, ROWS, Gradients(q, scores=q.new_empty(1, 4, 256, 256)), s),
    "backward_columns": lambda q, k, s: backward(q, k, k, q, ROWS, Gradients(q, softmax_col_sum=COLUMNS), s),
    "backward_entropy": lambda q, k, s: backward(q, k, k, q, ROWS, Gradients(q, entropy=ROWS), s),
    "columns_of_one_query": lambda q, k, s: through_columns(
        *(q[:, :, :1], k, ROWS[:, :, :1]), describe_score_grads(q, Gradients(softmax_col_sum=COLUMNS)), s
    ),
    "row_sum_grads": lambda q, k, s: linear_row_sum_grads(q, k, ROWS, s),
    "col_sum_grads": lambda q, k, s: linear_col_sum_grads(q, k, COLUMNS, s),
}


class Compiled(NamedTuple):
    """What the compiler made of one launch; bytes are per thread (stack) and per thread block (shared memory)."""

    case: str
    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int


class AbsentGPU:
    """Stands in for Triton's driver: knows which GPU to compile for, and that there is none to launch on."""

    def __init__(self, arch: int):
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_instead_of_launch(arch: int, only: list[str] | None = None) -> Iterator[list]:
    """Make every `kernel[grid](...)` compile for `arch` and stop there; yields the list of compiled kernels.

    Args:
        only: kernels by their name; others are left out. None for all.
    """
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if only is None or self.__name__ in only:
            compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.driver.set_active(AbsentGPU(arch))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return cuobjdump's figures for a kernel, such as {"REG": 128, "STACK": 0, "SHARED": 0}."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def compile_case(case: str, launch: Callable[[], object], arch: int, only: list[str] | None = None) -> list[Compiled]:
    """Compile the kernels that `launch()` would start, or `only` some of them."""
    with compile_instead_of_launch(arch, only) as kernels:
        launch()
    reports = []
    for kernel in kernels:
        usage = resource_usage(kernel.asm["cubin"])
        reports.append(Compiled(case, kernel.name, arch, usage["REG"], usage["STACK"], kernel.metadata.shared))
    return reports


def launches(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name and the launch of every kernel × variant × dtype × head dimension × mask of an architecture."""
    for dtype_name, dtype in DTYPES.items():
        for head_dim in (64, 128, 256):
            q = torch.empty(1, 4, 256, head_dim, dtype=dtype)
            k = torch.empty(1, 2, 256, head_dim, dtype=dtype)
            real = torch.ones(1, 256, dtype=torch.bool)
            variants = {
                "forward": {},
                "window": {"window": (100, None)},
                "softcap": {"softcap": 20.0},
                "sinks": {"sinks": torch.ones(4)},
                "padding": {"key_padding_mask": real},
                "dropout": {"dropout_p": 0.1},
            }
            for causal in (False, True):
                suffix = f"{dtype_name}-d{head_dim}-{'causal' if causal else 'full'}"
                for name, options in variants.items():
                    setting = Setting(causal, **options)
                    yield f"{name}-{suffix}", lambda q=q, k=k, s=setting: stage2.forward(q, k, k, s)
                setting = Setting(causal)
                yield f"split-{suffix}", lambda q=q, k=k, s=setting: stage2.forward(q, k, k, s, n_splits=4)
                one = q[:, :, :1]
                yield f"decode-{suffix}", lambda q=one, k=k, s=setting: attention_forward(q, k, k, s, n_splits=4)
                yield f"simple-{suffix}", lambda q=q, k=k, c=causal: stage2.simple_forward(q, k, k, c)
                for name, launch in (SCORES_AND_SUMS | GRADIENTS).items():
                    yield f"{name}-{suffix}", lambda q=q, k=k, s=setting, launch=launch: launch(q, k, s)
    if arch < 89:  # no fp8 tensor cores
        return
    for dtype_name, dtype in {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.items():
        q = torch.empty(1, 4, 256, 128, dtype=dtype)
        setting = Setting(causal=True, descale=torch.ones(2))
        yield f"fp8-{dtype_name}-d128-causal", lambda q=q, s=setting: stage2.forward(q, q, q, s)


def compile_configs(configs: list[list], head_dim: int, dtype: torch.dtype, causal: bool, arch: int) -> None:
    """Compile the forward loop with each tile config; print what it needs, null where it does not compile."""
    q = torch.empty(1, 4, 256, head_dim, dtype=dtype)
    for config in configs:
        try:
            with choose(forward=TileConfig(*config)):
                resources = compile_case("forward", lambda: stage2.forward(q, q, q, Setting(causal)), arch)[0]._asdict()
        except Exception:  # whatever the compiler cannot do
            resources = None
        print(json.dumps({"config": config, "resources": resources}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_MEMORY_LIMIT))
    parser.add_argument("--only", nargs="+", default=[""], help="compile the cases whose name contains one of these")
    parser.add_argument("--kernels", nargs="+", help="compile these kernels; default: all that a case launches")
    parser.add_argument("--configs", type=json.loads, help="instead: a JSON list of tile configs of the forward loop")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--causal", action="store_true")
    args = parser.parse_args()
    if args.configs is not None:
        compile_configs(args.configs, args.head_dim, getattr(torch, args.dtype), args.causal, args.arch[-1])
        return
    for arch in args.arch:
        for case, launch in launches(arch):
            if any(part in case for part in args.only):
                for report in compile_case(case, launch, arch, args.kernels):
                    print(json.dumps(report._asdict()), flush=True)


if __name__ == "__main__":
    main()
