"""What can be compared honestly without a GPU: PyTorch with PyTorch, in time and memory, on the same CPU."""

from collections.abc import Iterator

import torch

from benchmark.cases import hidden_keys, naive
from benchmark.measure import median_ms
from benchmark.oracle import output_is_right
from benchmark.peak import bytes_beyond
from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.tiled_forward import tiled_attention

NOTE = (
    "On the CPU, PyTorch is compared with PyTorch. Figures of the Triton kernels need a GPU; the interpreter's "
    "speed says nothing about a kernel's, and is never timed. `python -m benchmark.run bytes` counts what kernels "
    "read and write, on any machine."
)


def cpu_rows(
    n_q: int = 1024, n_k: int = 1024, blocks: tuple[int, ...] = (128,), heads: int = 4, head_dim: int = 64
) -> Iterator[dict]:
    """Compare tiled with naive attention, for each edge of a tile."""
    q, k, v = (torch.randn(1, heads, n, head_dim) for n in (n_q, n_k, n_k))
    hidden = hidden_keys(q, k)
    calls = {"naive": lambda: naive(q, k, v, hidden)[:1]}
    for block in blocks:
        edges = {"block_m": block, "block_n": block}
        calls[f"tiled PyTorch, {block}×{block}"] = lambda e=edges: tiled_attention(q, k, v, Setting(causal=True), **e)
    for name, call in calls.items():
        row = {"method": name, "M": n_q, "N": n_k, "right": output_is_right(call()[0], q, k, v, True, min(64, n_q))}
        if row["right"]:
            row |= {"ms": median_ms(call, 50, 200, "cpu"), "beyond_mb": bytes_beyond(call, "cpu") / 1e6}
        yield row
