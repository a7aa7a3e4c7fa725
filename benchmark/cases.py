"""The shapes that are measured, and the implementations they are measured against."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# What one thread block may use, in bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED_MEMORY_LIMIT = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
}


class Shape(NamedTuple):
    """One attention problem with M = N."""

    batch: int
    n_heads: int
    n_kv_heads: int
    n: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        heads = str(self.n_heads) if self.n_heads == self.n_kv_heads else f"{self.n_heads}/{self.n_kv_heads}"
        return f"{self.batch},{heads},{self.n},{self.head_dim} {'causal' if self.causal else 'full'}"

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward pass: two matrix products, halved by a causal mask."""
        return 4 * self.batch * self.n_heads * self.n**2 * self.head_dim / (2 if self.causal else 1)

    def tensors(self, dtype: torch.dtype, seed: int = 0, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
        """Draw q, k and v."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = [
            (self.batch, heads, self.n, self.head_dim) for heads in (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        ]
        return tuple(torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes)


QWEN3_HEADS = {"batch": 1, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "causal": True}  # of Qwen3-8B

FORWARD_SHAPES = [
    Shape(4, 32, 32, 1024, 128, True),
    Shape(2, 32, 32, 4096, 128, True),
    Shape(1, 32, 32, 8192, 128, True),
    Shape(1, 32, 32, 16384, 128, True),
    Shape(1, 32, 8, 8192, 128, True),
    Shape(4, 32, 32, 4096, 64, True),
    Shape(2, 32, 32, 4096, 128, False),
    Shape(1, 32, 32, 16384, 128, False),
    Shape(1, 32, 8, 8192, 128, False),
    Shape(4, 32, 32, 4096, 64, False),
]


def naive(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return attention as one writes it first, with several matrices of M×N elements, and its logits, not masked."""
    logits = naive_logits(q, k)
    masked = logits if hidden is None else logits.masked_fill(hidden, -torch.inf)
    return masked.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), logits


def naive_logits(q: Tensor, k: Tensor) -> Tensor:
    """Return the matrix of scaled products."""
    return q * q.shape[3] ** -0.5 @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


def hidden_keys(q: Tensor, k: Tensor) -> Tensor:
    """Return the causal mask [M, N], True where a key lies after the query."""
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])


def sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's attention, held to one of its backends; None leaves the choice to PyTorch."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def causal_mask(b, h, i, j):
    """FlexAttention's `mask_mod`: query i sees the keys up to its own."""
    return i >= j


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    """Prepare FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if causal:
        block_mask = create_block_mask(causal_mask, None, None, q.shape[2], k.shape[2], device="cuda")
    torch._dynamo.reset()  # past its limit of recompilations it would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


def forward_peers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """Return what the forward pass is measured beside, by name."""
    return {
        "cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, causal),
        "SDPA-FA2": lambda: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, causal),
        "FlexAttention": flex(q, k, v, causal),
    }
