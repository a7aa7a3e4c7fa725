"""The backward pass beside cuDNN, FlashAttention-2 and FlexAttention."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmark.cases import Shape, forward_peers
from benchmark.measure import failure, median_ms, side_by_side, spread
from benchmark.oracle import GradientOracle
from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward.split_kv import attention_forward
from stage2_triton_forward.tile_config import TileConfig, choose
from stage4_backward.gradients import Gradients
from stage4_backward.launch import backward

BACKWARD_SHAPES = [
    Shape(2, 32, 32, 4096, 128, True),
    Shape(1, 32, 32, 8192, 128, True),
    Shape(1, 32, 32, 16384, 128, True),
    Shape(1, 32, 8, 8192, 128, True),
    Shape(4, 32, 32, 4096, 64, True),
    Shape(1, 32, 32, 16384, 128, False),
    Shape(4, 32, 32, 4096, 64, False),
]

FP32_TILES = {  # that ran: some with 8 warps compile, and then read where they must not, or never end
    "grad_q": [(32, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 2), (16, 32, 4, 1), (64, 16, 4, 2)],
    "grad_kv": [(32, 32, 4, 1), (32, 16, 4, 1), (32, 16, 4, 2), (32, 64, 4, 1), (64, 16, 4, 2)],
}


def fp32_tile_rows(n: int = 4096, n_heads: int = 8) -> Iterator[dict]:
    """Time the whole fp32 backward pass with each tile of either kernel, 32×32 for the other."""
    for head_dim in (64, 128):
        shape = Shape(1, n_heads, n_heads, n, head_dim, True)
        q, k, v = shape.tensors(torch.float32)
        grad_output = torch.randn_like(q)
        output, lse = attention_forward(q, k, v, Setting(causal=True))
        oracle = GradientOracle(q, k, v, grad_output, True)
        call = partial(backward, q, k, v, output, lse, Gradients(grad_output), Setting(causal=True))
        for kernel, tiles in FP32_TILES.items():
            for tile in tiles:
                configs = dict.fromkeys(FP32_TILES, TileConfig(*FP32_TILES["grad_q"][0], "tf32x3"))
                with choose(**(configs | {kernel: TileConfig(*tile, "tf32x3")})):
                    right = oracle.agrees(output, call()[:3])
                    ms = spread([median_ms(call, 5, 30) for _ in range(3)])
                yield {"head_dim": head_dim, "n": n, "kernel": kernel, "tile": list(tile), "right": right, **ms}


def backward_rows(dtype: torch.dtype = torch.bfloat16) -> Iterator[dict]:
    """Time the backward pass alone of every shape; a peer that cannot run a shape is left out of its row."""
    for shape in BACKWARD_SHAPES:
        q, k, v = (x.requires_grad_() for x in shape.tensors(dtype))
        grad_output = torch.randn_like(q)
        with torch.no_grad():
            output, lse = attention_forward(q, k, v, Setting(shape.causal))

        leaves = [x.detach() for x in (q, k, v)]
        calls = {"ours": partial(backward, *leaves, output, lse, Gradients(grad_output), Setting(shape.causal))}
        row = {
            "shape": str(shape),
            "dtype": str(dtype),
            "right": GradientOracle(q, k, v, grad_output, shape.causal).agrees(output, calls["ours"]()[:3]),
        }
        for name, forward in forward_peers(q, k, v, shape.causal).items():
            try:
                calls[name] = partial(torch.autograd.grad, forward(), (q, k, v), grad_output, retain_graph=True)
                calls[name]()
            except Exception as error:
                row[name] = {"error": failure(error)}
                calls.pop(name, None)
        for name, times in side_by_side(calls).items():
            row[name] = spread(times) | {"tflops": 2.5 * shape.flops / spread(times)["ms"] / 1e9}
        yield row
        del calls
