"""Stage 4: the gradients of keys and values, by a kernel that walks the queries of all heads of a group."""

import pytest
import torch
from gradient_helpers import LOSSES, SHAPES, Kernel, make_problem
from helpers import Case, make_qkv


@pytest.fixture
def grad_kv(graded, monkeypatch):
    return Kernel("grad_kv", graded("stage4_backward", "launch"), monkeypatch)


@pytest.mark.parametrize("name", ["output and lse", "entropy", "everything"])
def test_rows_that_see_nothing_give_nothing(grad_kv, device, name):
    problem = make_problem(SHAPES["M > N"], device=device, loss=LOSSES[name], causal=True)
    expected = grad_kv(problem)
    for name in ("output", "lse", "scores", "entropy"):
        if name in problem.grads:
            problem.grads[name][:, :, :117] = 1e6
    for grad, same in zip(grad_kv(problem).values(), expected.values(), strict=True):
        assert torch.equal(grad, same)


def test_keys_that_no_query_sees(grad_kv, device):
    case = SHAPES["M < N"]
    real = torch.ones(case.batch, case.n_k, dtype=torch.bool, device=device)
    real[:, 140] = False
    options = {"causal": True, "window": (8, None), "key_padding_mask": real}
    problem = make_problem(case, device=device, loss=LOSSES["everything"], **options)
    for grad in grad_kv(problem).values():
        assert (grad[:, :, : 150 - 21 - 8] == 0).all()
        assert (grad[:, :, 140] == 0).all()
        assert (grad[:, :, 141:] != 0).any(-1).all()


def test_query_heads_of_a_group_add_up(grad_kv, device):
    """What a key head gets is the sum of what it would get as a key head for each of its query heads alone."""
    problem = make_problem(SHAPES["self"], device=device, causal=True)
    q, k, v, output, lse = problem.inputs
    apart = problem._replace(inputs=(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), output, lse))
    for grad, of_each in zip(grad_kv(problem).values(), grad_kv(apart).values(), strict=True):
        torch.testing.assert_close(grad, of_each.unflatten(1, (2, 2)).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_head(grad_kv, device, poison):
    case = SHAPES["self"]._replace(n_heads=3, n_kv_heads=3)
    problem = make_problem(case, device=device, causal=True)
    clean = grad_kv(problem)
    problem.inputs[1][0, 0, 3, 5] = poison
    problem.grads["output"][0, 2, 69, 2] = poison  # the last row, in a tile that ends beyond the head
    grad_k, grad_v = grad_kv(problem).values()
    assert torch.equal(grad_k[0, 1], clean["k"][0, 1])
    assert torch.equal(grad_v[0, 1], clean["v"][0, 1])
    assert not grad_k[0, 0, 3].isfinite().all()
    assert not grad_k[0, 2].isfinite().all(-1).any()
    assert not grad_v[0, 2, :, 2].isfinite().any()
    assert torch.equal(grad_v[0, 2, :, 3:], clean["v"][0, 2, :, 3:])


@pytest.mark.gpu
def test_more_than_two_to_the_31_scores(grad_kv):
    """With a gradient of one head's last scores alone, dk = s·gᵀ·q there, and 0 elsewhere."""
    q, k, v = make_qkv(Case(1, 9, 1, 16384, 16384, 16, False), torch.bfloat16, "cuda")
    scores = torch.zeros(1, 9, 16384, 16384, dtype=torch.bfloat16, device="cuda")
    scores[0, 8, 16000:, 16000:] = torch.randn(384, 384, device="cuda")
    assert scores.numel() > 2**31
    lse = torch.full(q.shape[:3], torch.inf, device="cuda")
    problem = make_problem(Case(1, 1, 1, 1, 1, 16, False), device="cuda")
    grad_k, grad_v = grad_kv(problem._replace(inputs=(q, k, v, q, lse), grads={"scores": scores}, options={})).values()
    expected = scores[0, 8, 16000:, 16000:].double().mT @ q[0, 8, 16000:].double() / 4
    torch.testing.assert_close(grad_k[0, 0, 16000:].double(), expected, rtol=2e-2, atol=2e-2)
    assert (grad_k[0, 0, :16000] == 0).all()
    assert (grad_v == 0).all()
