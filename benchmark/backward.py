"""The backward pass beside cuDNN, FlashAttention-2 and FlexAttention."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmark.cases import Shape, forward_peers
from benchmark.measure import failure, side_by_side, spread
from benchmark.oracle import GradientOracle
from stage2_triton_forward.split_kv import attention_forward
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


def backward_rows(dtype: torch.dtype = torch.bfloat16) -> Iterator[dict]:
    """Time the backward pass alone of every shape; a peer that cannot run a shape is left out of its row."""
    for shape in BACKWARD_SHAPES:
        q, k, v = (x.requires_grad_() for x in shape.tensors(dtype))
        grad_output = torch.randn_like(q)
        with torch.no_grad():
            output, lse = attention_forward(q, k, v, shape.causal)

        leaves = [x.detach() for x in (q, k, v)]
        calls = {"ours": partial(backward, *leaves, output, lse, Gradients(grad_output), shape.causal)}
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
