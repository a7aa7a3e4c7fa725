"""The forward pass beside cuDNN, FlashAttention-2 and FlexAttention, and decoding against the copy rate."""

from collections.abc import Iterator

import torch

from benchmark.cases import FORWARD_SHAPES, forward_peers
from benchmark.measure import copy_rate, failure, n_bytes, side_by_side, spread
from benchmark.oracle import output_is_right
from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward.launch import forward
from stage2_triton_forward.split_kv import attention_forward

DECODE_LENGTHS = (32768, 65536, 131072)


def forward_rows(dtype: torch.dtype = torch.bfloat16) -> Iterator[dict]:
    """Time every shape; a peer that cannot run a shape is left out of its row."""
    for shape in FORWARD_SHAPES:
        q, k, v = shape.tensors(dtype)
        setting = Setting(shape.causal)
        calls = {"ours": lambda q=q, k=k, v=v, s=setting: forward(q, k, v, s)[0]}
        calls |= forward_peers(q, k, v, shape.causal)
        row = {
            "shape": str(shape),
            "dtype": str(dtype),
            "right": output_is_right(calls["ours"](), q, k, v, shape.causal),
        }
        for name in list(calls):
            try:
                calls[name]()
            except Exception as error:
                row[name] = {"error": failure(error)}
                del calls[name]
        for name, times in side_by_side(calls).items():
            row[name] = spread(times) | {"tflops": shape.flops / spread(times)["ms"] / 1e9}
        yield row


def decode_rows(dtype: torch.dtype = torch.bfloat16, layers: int = 8, caches: int = 4) -> Iterator[dict]:
    """Time one query against long caches; what counts is how fast keys and values are read.

    A step of generation runs many layers from one CUDA graph, and so does this: `layers` calls in a graph, over
    different caches, so that the time of a call is the GPU's and neither Python's nor the graph's start.
    """
    copied = copy_rate("cuda")
    setting = Setting(causal=True)
    for n in DECODE_LENGTHS:
        q = torch.randn(1, 32, 1, 128, device="cuda").to(dtype)
        cache = [[torch.randn(1, 8, n, 128, device="cuda").to(dtype) for _ in range(2)] for _ in range(caches)]
        right = all(output_is_right(attention_forward(q, *kv, setting)[0], q, *kv, True) for kv in cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(layers):
                attention_forward(q, *cache[layer % caches], setting)
        times = [ms / layers for ms in side_by_side({"ours": graph.replay})["ours"]]
        rate = n_bytes(*cache[0]) / spread(times)["ms"] / 1e6
        yield {"n": n, "right": right, **spread(times), "GB/s": rate, "copy GB/s": copied, "share": rate / copied}


def fp8_rows(n: int = 2048, head_dim: int = 128) -> Iterator[dict]:
    """Measure the error of fp8 inputs, relative to the output's root mean square, against float64.

    `kernel_error` is against float64 on the quantised inputs: what the kernel itself loses. `quantisation_error` is
    what rounding the inputs to fp8 had cost before: float64 on the quantised against float64 on the given inputs.
    """
    exact = [torch.randn(1, 4, n, head_dim, dtype=torch.float64, device="cuda") for _ in range(3)]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        q, k, v = (x.to(dtype) for x in exact)
        for causal in (False, True):
            output, _ = attention_forward(q, k, v, Setting(causal))
            quantised = naive_attention(q.double(), k.double(), v.double(), causal).output
            unquantised = naive_attention(*exact, causal).output
            size = unquantised.square().mean().sqrt()
            yield {
                "dtype": str(dtype).removeprefix("torch.float8_"),
                "causal": causal,
                "n": n,
                "head_dim": head_dim,
                "kernel_error": ((output - quantised).square().mean().sqrt() / size).item(),
                "quantisation_error": ((quantised - unquantised).square().mean().sqrt() / size).item(),
            }
