"""Small launches of every kernel on ragged shapes, to be run under compute-sanitizer, which is slow: choose a stage.

`compute-sanitizer --tool memcheck python3 -m benchmark.sanitize 3`
"""

import os
import sys

import torch

from stage2_triton_forward import launch as stage2
from stage2_triton_forward.split_kv import attention_forward
from stage3_scores_and_sums import launch as stage3
from stage3_scores_and_sums.column_sums import fold_columns
from stage3_scores_and_sums.hooks import largest_weight
from stage4_backward.gradients import Gradients
from stage4_backward.launch import backward
from stage4_backward.linear_grads import linear_col_sum_grads, linear_row_sum_grads


def forward(q: torch.Tensor, k: torch.Tensor, causal: bool, options: dict) -> None:
    """Launch stage 2's kernels."""
    stage2.simple_forward(q, k, k, causal)
    stage2.forward(q, k, k, causal, **options)
    stage2.forward(q, k, k, causal, dropout_p=0.1, softcap=5.0)
    attention_forward(q[:, :, :1], k, k, causal, n_splits=3, sinks=torch.randn(q.shape[1], device="cuda"))


def scores_and_sums(q: torch.Tensor, k: torch.Tensor, causal: bool, options: dict) -> None:
    """Launch stage 3's kernels and hooks."""
    stage3.attention_with_scores(q, k, k, causal, **options)
    stage3.compute_attention_scores(q, k, causal, **options)
    _, lse, _ = stage3.attention_with_row_sum(q, k, k, causal, algorithm="kahan", **options)
    stage3.attention_with_row_sum(q, k, k, causal, **options)
    cut = min(q.shape[2], k.shape[2]) // 2
    for algorithm in ("linear", "atomic_reverse", "atomic_round_robin"):
        stage3.attention_with_col_sum(q, k, k, causal, algorithm=algorithm, **options)
    for region in ({}, {"q_begin": cut, "k_stop": cut}, {"q_begin": cut, "k_stop": cut, "buffered": True}):
        stage3.attention_with_softmax_col_sum(q, k, k, causal, **region, **options)
    stage3.attention_with_stats(q, k, k, causal, **options)
    stage3.fold_rows(q, k, lse, largest_weight, 0.0, causal, **options)
    fold_columns(q, k, lse, largest_weight, 0.0, causal, **options)


def gradients(q: torch.Tensor, k: torch.Tensor, causal: bool, options: dict) -> None:
    """Launch stage 4's kernels."""
    output, lse = attention_forward(q, k, k, causal, **options)
    columns = torch.randn(*k.shape[:3], device="cuda")
    grads = Gradients(torch.randn_like(output), torch.randn_like(lse), softmax_col_sum=columns)
    backward(q, k, k, output, lse, grads, causal, **options)
    linear_row_sum_grads(q, k, torch.randn_like(lse), causal, **options)
    linear_col_sum_grads(q, k, columns, causal, **options)


STAGES = {"2": forward, "3": scores_and_sums, "4": gradients}


def main() -> None:
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else tensors share a block, and reading past one is no error
    torch.manual_seed(0)
    for stage in sys.argv[1:] or STAGES:
        for n_q, n_k, causal in ((70, 136, True), (130, 70, False)):
            q = torch.randn(1, 4, n_q, 64, device="cuda", dtype=torch.float16)
            k = torch.randn(1, 2, n_k, 64, device="cuda", dtype=torch.float16)
            window = {"window": (9, 3), "key_padding_mask": torch.rand(1, n_k, device="cuda") > 0.3}
            for options in ({}, window) if causal else ({},):
                STAGES[stage](q, k, causal, options)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
