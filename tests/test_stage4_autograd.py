"""Stage 4, first slice: the forward passes of the autograd Functions."""

import pytest
import torch
from helpers import assert_right, references


@pytest.fixture(params=["FlashAttentionPyTorchFunc", "FlashAttentionTritonFunc"])
def function(request, graded):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    return getattr(graded("stage4_backward", "autograd"), request.param)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 40, 16), (2, 3, 40, 16)], ids=["3-D", "4-D"])
def test_forward(function, device, shape, is_causal):
    q, k, v = (torch.randn(shape, device=device) for _ in range(3))
    oracle, naive = references(q, k, v, is_causal)
    assert_right("output", function.apply(q, k, v, is_causal), oracle, naive)


@pytest.mark.parametrize("shape", [(2, 40, 16), (2, 3, 40, 16)], ids=["3-D", "4-D"])
def test_saves_exactly_one_lse(function, device, shape):
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    output = function.apply(q, k, v, True)
    saved = output.grad_fn.saved_tensors
    oracle, naive = references(q.detach(), k.detach(), v.detach(), True)
    of_lse_shape = [x for x in saved if x.shape == shape[:-1]]
    assert len(of_lse_shape) == 1
    assert_right("lse", of_lse_shape[0], oracle, naive)
    assert len(saved) == 5
