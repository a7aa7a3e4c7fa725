"""Small launches of every kernel on ragged shapes, to be run under compute-sanitizer, which is slow: choose a stage.

`compute-sanitizer --tool memcheck python3 -m benchmark.sanitize 3`
"""

import os
import sys

import torch

from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward import launch as stage2
from stage2_triton_forward.split_kv import attention_forward
from stage3_scores_and_sums import launch as stage3
from stage3_scores_and_sums.column_sums import fold_columns
from stage3_scores_and_sums.hooks import largest_weight
from stage4_backward.gradients import Gradients
from stage4_backward.launch import backward
from stage4_backward.linear_grads import linear_col_sum_grads, linear_row_sum_grads


def forward(q: torch.Tensor, k: torch.Tensor, setting: Setting) -> None:
    """Launch stage 2's kernels."""
    stage2.simple_forward(q, k, k, setting.causal)
    stage2.forward(q, k, k, setting)
    stage2.forward(q, k, k, setting._replace(dropout_p=0.1, softcap=5.0))
    with_sinks = setting._replace(sinks=torch.randn(q.shape[1], device="cuda"))
    attention_forward(q[:, :, :1], k, k, with_sinks, n_splits=3)


def scores_and_sums(q: torch.Tensor, k: torch.Tensor, setting: Setting) -> None:
    """Launch stage 3's kernels and hooks."""
    stage3.attention_with_scores(q, k, k, setting)
    stage3.compute_attention_scores(q, k, setting)
    _, lse, _ = stage3.attention_with_row_sum(q, k, k, setting, algorithm="kahan")
    stage3.attention_with_row_sum(q, k, k, setting)
    cut = min(q.shape[2], k.shape[2]) // 2
    for algorithm in ("linear", "atomic_reverse", "atomic_round_robin"):
        stage3.attention_with_col_sum(q, k, k, setting, algorithm=algorithm)
    for region in ({}, {"q_begin": cut, "k_stop": cut}, {"q_begin": cut, "k_stop": cut, "buffered": True}):
        stage3.attention_with_softmax_col_sum(q, k, k, setting, **region)
    stage3.attention_with_stats(q, k, k, setting)
    stage3.fold_rows(q, k, lse, setting, largest_weight)
    fold_columns(q, k, lse, setting, largest_weight)


def gradients(q: torch.Tensor, k: torch.Tensor, setting: Setting) -> None:
    """Launch stage 4's kernels."""
    output, lse = attention_forward(q, k, k, setting)
    columns = torch.randn(*k.shape[:3], device="cuda")
    grads = Gradients(
        torch.randn_like(output), torch.randn_like(lse), softmax_col_sum=columns, entropy=torch.randn_like(lse)
    )
    backward(q, k, k, output, lse, grads, setting)
    linear_row_sum_grads(q, k, torch.randn_like(lse), setting)
    linear_col_sum_grads(q, k, columns, setting)


STAGES = {"2": forward, "3": scores_and_sums, "4": gradients}


def main() -> None:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else tensors share a block, and reading past one is no error
    torch.manual_seed(0)
    for stage in sys.argv[1:] or STAGES:
        for n_q, n_k, causal in ((70, 136, True), (130, 70, False)):
            q = torch.randn(1, 4, n_q, 64, device="cuda", dtype=torch.float16)
            k = torch.randn(1, 2, n_k, 64, device="cuda", dtype=torch.float16)
            plain, real = Setting(causal), torch.rand(1, n_k, device="cuda") > 0.3
            windowed = plain._replace(window=(9, 3), key_padding_mask=real)
            for setting in (plain, windowed) if causal else (plain,):
                STAGES[stage](q, k, setting)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
