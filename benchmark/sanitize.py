"""One small launch of every kernel on ragged shapes, to be run under compute-sanitizer.

`compute-sanitizer --tool memcheck python3 -m benchmark.sanitize`
"""

import torch

from stage2_triton_forward import launch as stage2
from stage2_triton_forward.split_kv import attention_forward
from stage3_scores_and_sums import launch as stage3


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
                stage3.attention_with_scores(q, k, k, causal)
                stage3.compute_attention_scores(q, k, causal)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
