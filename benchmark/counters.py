"""One launch of each kernel family at a real size, to be run under Nsight Compute, and what it counted:

    ncu --csv --page raw --clock-control none --metrics $(python3 -m benchmark.counters --metrics) \\
        --kernel-name 'regex:_kernel$' python3 -m benchmark.counters > counters.csv
    python3 -m benchmark.counters --read counters.csv   # writes results/counters.json
"""

import csv
import io
import sys
from pathlib import Path

import torch

METRICS = {
    "ms": "gpu__time_duration.sum",
    "tensor_cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue_slots": "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "spill_instructions": "sm__sass_inst_executed_op_local.sum",
}


def launch_all(n: int = 4096) -> None:
    """Launch forward, scores, sums and backward once each: B = 1, Hq = 32, Hk = 8, D = 128, bf16, causal."""
    from benchmark.cases import Shape
    from stage1_pytorch_tiled.setting import Setting
    from stage2_triton_forward.split_kv import attention_forward
    from stage3_scores_and_sums import launch
    from stage4_backward.gradients import Gradients
    from stage4_backward.launch import backward

    setting = Setting(causal=True)
    q, k, v = Shape(1, 32, 8, n, 128, True).tensors(torch.bfloat16)
    output, lse = attention_forward(q, k, v, setting)
    launch.attention_with_scores(q, k, v, setting)
    launch.attention_with_col_sum(q, k, v, setting)
    launch.attention_with_col_sum(q, k, v, setting, algorithm="atomic_reverse")
    launch.attention_with_softmax_col_sum(q, k, v, setting)
    backward(q, k, v, output, lse, Gradients(torch.randn_like(output)), setting)
    attention_forward(q[:, :, :1], k, v, setting)
    torch.cuda.synchronize()


def read(text: str) -> list[dict]:
    """Turn Nsight Compute's raw CSV page into a row for each launch."""
    lines = text[text.index('"ID"') :].splitlines()
    table = list(csv.DictReader(io.StringIO("\n".join(lines))))
    units, launches = table[0], table[1:]
    rows = []
    for launch in launches:
        row = {"kernel": launch["Kernel Name"].split("(")[0], "grid": launch["Grid Size"]}
        if "::" in row["kernel"]:
            continue  # PyTorch's
        for name, metric in METRICS.items():
            if launch.get(metric):
                row[name] = float(launch[metric].replace(",", ""))
        row["ms"] *= {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3}[units[METRICS["ms"]]]
        rows.append(row)
    return rows


def main() -> None:
    arguments = sys.argv[1:]
    if arguments == ["--metrics"]:
        print(",".join(METRICS.values()))
    elif arguments[:1] == ["--read"]:
        from benchmark.record import Record
        from benchmark.render import RESULTS

        record = Record((Path(arguments[2]) if len(arguments) > 2 else RESULTS) / "counters")
        record.rows = read(Path(arguments[1]).read_text())
        record.write()
    else:
        launch_all()


if __name__ == "__main__":
    main()
