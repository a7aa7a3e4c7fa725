"""The backward pass beside cuDNN, FlashAttention-2 and FlexAttention."""

from functools import partial

import torch
from rich.progress import track
from torch import Tensor

from benchmark.cases import Shape, forward_peers
from benchmark.measure import side_by_side, spread
from course.grader import compare
from stage1_pytorch_tiled.dense import naive_attention
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


def backward_rows(dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Time the backward pass alone of every shape; a peer that cannot run a shape is left out of its row."""
    rows = []
    for shape in track(BACKWARD_SHAPES, "backward"):
        q, k, v = (x.requires_grad_() for x in shape.tensors(dtype))
        grad_output = torch.randn_like(q)
        with torch.no_grad():
            output, lse = attention_forward(q, k, v, shape.causal)

        leaves = [x.detach() for x in (q, k, v)]
        calls = {"ours": partial(backward, *leaves, output, lse, Gradients(grad_output), shape.causal)}
        row = {
            "shape": str(shape),
            "dtype": str(dtype),
            "right": _right(calls["ours"]()[:3], q, k, v, grad_output, shape),
        }
        for name, forward in forward_peers(q, k, v, shape.causal).items():
            try:
                calls[name] = partial(torch.autograd.grad, forward(), (q, k, v), grad_output, retain_graph=True)
                calls[name]()
            except Exception as error:
                row[name] = {"error": str(error).splitlines()[0]}
                calls.pop(name, None)
        for name, times in side_by_side(calls).items():
            row[name] = spread(times) | {"tflops": 2.5 * shape.flops / spread(times)["ms"] / 1e9}
        rows.append(row)
        del calls
    return rows


def _right(grads: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, grad_output: Tensor, shape: Shape) -> bool:
    """Compare the gradients of one head group with float64, on its last rows' queries and all of its keys.

    The matrix of all rows would not fit at N = 16384, so that only the queries' gradients of the last rows are
    compared there; at N <= 4096 those of keys and values are compared too.
    """
    group, rows = shape.n_heads // shape.n_kv_heads, 64 if shape.n > 4096 else shape.n
    parts = [q[:1, :group, -rows:], k[:1, :1], v[:1, :1]]
    references = []
    for dtype in (torch.float64, q.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in parts]
        result = naive_attention(*leaves, causal=shape.causal).output
        references.append(torch.autograd.grad(result, leaves, grad_output[:1, :group, -rows:].to(dtype)))
    actual = [grads[0][:1, :group, -rows:], grads[1][:1, :1], grads[2][:1, :1]]
    compared = zip(actual, *references, strict=True) if rows == shape.n else [(actual[0], *(x[0] for x in references))]
    return all(compare(*triple).ok for triple in compared)
