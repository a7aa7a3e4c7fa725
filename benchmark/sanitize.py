"""One small launch of every kernel on ragged shapes, to be run under compute-sanitizer.

`compute-sanitizer --tool memcheck python3 -m benchmark.sanitize`
"""

import torch

from stage2_triton_forward import launch as stage2
from stage3_scores_and_sums import launch as stage3


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.float32):
        for n_q, n_k, head_dim in ((70, 130, 64), (130, 70, 24), (1, 65, 128)):
            q = torch.randn(1, 4, n_q, head_dim, device="cuda", dtype=dtype)
            k = torch.randn(1, 2, n_k, head_dim, device="cuda", dtype=dtype)
            for causal in (False, True):
                stage2.simple_forward(q, k, k, causal)
                stage2.forward(q, k, k, causal, dropout_p=0.1, seed=1)
                stage3.attention_with_scores(q, k, k, causal)
                stage3.compute_attention_scores(q, k, causal)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
