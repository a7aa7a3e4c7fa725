"""Stage 4: the autograd Functions, forward and backward."""

import pytest
import torch
from gradient_helpers import make_problem
from helpers import HALF, Case, assert_right, make_qkv, references

CACHE = Case(1, 4, 2, 21, 90, 16, True)
SHAPES = {"3-D": (2, 40, 16), "4-D": (2, 3, 40, 16)}

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(params=["FlashAttentionPyTorchFunc", "FlashAttentionTritonFunc"])
def function(request, graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return getattr(graded("stage4_backward", "autograd"), request.param)


def check(function, q, k, v, is_causal):
    """Compare the output and, from the same gradient of it, those of q, k and v; all 4-D."""
    problem = make_problem(None, device=q.device, qkv=(q, k, v), causal=is_causal)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    output = function.apply(*inputs, is_causal)
    oracle, naive = references(q.detach(), k.detach(), v.detach(), is_causal)
    assert_right("output", output, oracle, naive, dtype=q.dtype)
    output.backward(problem.grads["output"])
    for name, x in zip("qkv", inputs, strict=True):
        problem.check(name, x.grad)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", [Case(2, 3, 3, 40, 40, 16, True), CACHE, Case(1, 2, 1, 70, 33, 16, True)], ids=str)
def test_output_and_gradients(function, device, case, is_causal):
    check(function, *make_qkv(case, device=device), is_causal)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(function, device, dtype):
    check(function, *make_qkv(CACHE, dtype, device), True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_three_dimensions_are_one_head(function, device, is_causal):
    qkv = [torch.randn(2, 40, 16, device=device) for _ in range(3)]
    grad = torch.randn(2, 40, 16, device=device)
    flat = [x.clone().requires_grad_() for x in qkv]
    with_heads = [x.unsqueeze(1).clone().requires_grad_() for x in qkv]
    output, expected = function.apply(*flat, is_causal), function.apply(*with_heads, is_causal)
    assert torch.equal(output, expected[:, 0])
    output.backward(grad)
    expected.backward(grad[:, None])
    for x, y in zip(flat, with_heads, strict=True):
        assert torch.equal(x.grad, y.grad[:, 0])


@each_shape
def test_saves_exactly_one_lse(function, device, shape):
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    output = function.apply(q, k, v, True)
    saved = output.grad_fn.saved_tensors
    oracle, naive = references(q.detach(), k.detach(), v.detach(), True)
    of_lse_shape = [x for x in saved if x.shape == shape[:-1]]
    assert len(of_lse_shape) == 1
    assert_right("lse", of_lse_shape[0], oracle, naive)
    assert len(saved) == 5
    storages = {x.untyped_storage().data_ptr() for x in saved}
    for x in (q, k, v, output):
        assert x.untyped_storage().data_ptr() in storages, "copies were saved"
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_not_causal_by_default(function, device):
    q, k, v = (x.requires_grad_() for x in make_qkv(CACHE, device=device))
    grad = torch.randn_like(q)
    by_default = torch.autograd.grad(function.apply(q, k, v), (q, k, v), grad)
    for actual, expected in zip(
        by_default, torch.autograd.grad(function.apply(q, k, v, False), (q, k, v), grad), strict=True
    ):
        assert torch.equal(actual, expected)


def test_second_derivatives_are_refused(function, device):
    q, k, v = (x.requires_grad_() for x in make_qkv(CACHE, device=device))
    (grad_q,) = torch.autograd.grad(function.apply(q, k, v, True).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_q.sum().backward()
