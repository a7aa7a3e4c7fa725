"""One small launch of every kernel on ragged shapes, to be run under compute-sanitizer.

`compute-sanitizer --tool memcheck python3 -m benchmark.sanitize`
"""

import torch

from stage2_triton_forward import launch as stage2
from stage2_triton_forward.split_kv import attention_forward
from stage3_scores_and_sums import launch as stage3
from stage3_scores_and_sums.column_sums import fold_columns
from stage3_scores_and_sums.hooks import largest_weight


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


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.float32):
        for n_q, n_k, head_dim in ((70, 130, 64), (130, 70, 24), (1, 65, 128)):
            q = torch.randn(1, 4, n_q, head_dim, device="cuda", dtype=dtype)
            k = torch.randn(1, 2, n_k, head_dim, device="cuda", dtype=dtype)
            real, sinks = torch.rand(1, n_k, device="cuda") > 0.3, torch.randn(4, device="cuda")
            for causal in (False, True):
                stage2.simple_forward(q, k, k, causal)
                for options in ({}, {"dropout_p": 0.1}, {"window": (9, 3), "softcap": 5.0, "key_padding_mask": real}):
                    stage2.forward(q, k, k, causal, **options)
                attention_forward(q[:, :, :1], k, k, causal, n_splits=3, sinks=sinks)
                for options in ({}, {"window": (9, 3), "key_padding_mask": real}):
                    scores_and_sums(q, k, causal, options)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
