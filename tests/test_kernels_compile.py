"""Every kernel × hook × dtype compiles for GPUs that need not be here, and fits them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.cases import SHARED_MEMORY_LIMIT

ROOT = Path(__file__).parent.parent
VARIANTS = {"forward", "window", "softcap", "sinks", "padding", "dropout", "split"}
SCORES = {"with_scores", "scores_alone", "stats", "fold_rows", "fold_columns"}
RAW_SUMS = {"row_sum_kahan", "row_sum_linear", "col_sum_linear", "col_sum_reverse", "col_sum_round_robin"}
SOFTMAX_SUMS = {"softmax_col_sum", "softmax_col_sum_window", "softmax_cross", "softmax_cross_stored"}
BACKWARD = {
    "backward",
    *(f"backward_{name}" for name in ("softcap", "dropout", "window", "scores", "columns", "entropy")),
}
GRADIENTS = BACKWARD | {"columns_of_one_query", "row_sum_grads", "col_sum_grads"}
KERNELS = VARIANTS | {"decode", "simple"} | SCORES | RAW_SUMS | SOFTMAX_SUMS | GRADIENTS
EVERY_KERNEL = {f"{name}_kernel" for name in ("forward", "merge", "simple_forward", "column_sum", "delta")}
EVERY_KERNEL |= {f"{name}_kernel" for name in ("chunk_sum", "prefix_sum", "interval_sum", "interval_vector")}
EVERY_KERNEL |= {"grad_q_kernel", "grad_kv_kernel"}
SPILLS = {  # what may spill in half precision, and how many bytes of a thread's
    80: {
        "decode": 8,
        "col_sum_linear": 448,  # under a causal mask and a window: two ends; it takes a small part of attention's time
        "backward": 64,
        "backward_softcap": 40,
        "backward_dropout": 176,
        "backward_scores": 24,
        "backward_columns": 64,
        "backward_entropy": 96,
    },
    90: {  # of the gradients of k and v: two accumulators, in the tiles that were the fastest nevertheless
        "backward": 72,
        "backward_softcap": 80,
        "backward_dropout": 184,
        "backward_window": 112,
        "backward_scores": 256,
        "backward_columns": 48,
        "backward_entropy": 80,
    },
}


def compiled(archs, *only):
    """Compile the cases whose name contains one of `only`, in one process for all architectures; return the reports."""
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    command = [sys.executable, "-m", "benchmark.ahead_of_time", "--arch", *map(str, archs), "--only", *only]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    for report in reports:
        assert report["shared_bytes"] <= SHARED_MEMORY_LIMIT[report["arch"]], report
    return reports


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_half_precision_does_not_spill(arch, dtype):
    shape = f"{dtype}-d{64 if dtype == 'fp32' else 128}-causal"  # compiling fp32 takes twice as long
    reports = compiled([arch], shape)
    assert {report["case"].removesuffix(f"-{shape}") for report in reports} >= KERNELS
    for report in reports:
        if dtype != "fp32":
            allowed = SPILLS[arch].get(report["case"].removesuffix(f"-{shape}"), 0)
            assert report["stack_bytes"] <= allowed, f"registers spill: {report}"


def test_each_kernel_compiles():
    kinds = ("simple", "forward", "decode", "row_sum_linear", "softmax_col_sum", "backward", "row_sum_grads")
    reports = compiled([80, 90], *(f"{kind}-bf16-d64-causal" for kind in kinds))
    for arch in (80, 90):
        assert {report["kernel"] for report in reports if report["arch"] == arch} == EVERY_KERNEL


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["forward-fp16-d128-full", "forward-bf16-d256-full"])
def test_other_gpus_get_tiles_that_fit(case):
    archs = [75, 80, 86, 89]
    assert [report["arch"] for report in compiled(archs, case)] == archs


@pytest.mark.thorough
@pytest.mark.parametrize("arch", [80, 90])
def test_the_widest_fp32_rows_fit(arch):
    reports = compiled([arch], "forward-fp32-d256-causal", "backward-fp32-d256-causal")
    assert len({report["case"] for report in reports}) == 2


@pytest.mark.thorough
def test_other_widths_and_fp8_do_not_spill_on_hopper():
    reports = compiled([90], "fp8", "forward-fp16-d64-causal", "forward-fp16-d256-causal")
    assert len({report["case"] for report in reports}) == 4
    for report in reports:
        assert report["stack_bytes"] <= (8 if "e4m3" in report["case"] else 0), f"registers spill: {report}"
