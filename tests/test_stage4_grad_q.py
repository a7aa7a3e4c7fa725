"""Stage 4: the gradient of the queries, by a kernel that walks the keys and recomputes their weights."""

import pytest
import torch
from gradient_helpers import LOSSES, SHAPES, Kernel, make_problem
from helpers import Case, make_qkv


@pytest.fixture
def grad_q(graded, monkeypatch):
    return Kernel("grad_q", graded("stage4_backward", "launch"), monkeypatch)


@pytest.mark.parametrize("name", ["output and lse", "entropy", "everything"])
def test_rows_that_see_nothing(grad_q, device, name):
    problem = make_problem(SHAPES["M > N"], device=device, loss=LOSSES[name], causal=True)
    grad = grad_q(problem)["q"]
    assert (grad[:, :, :117] == 0).all()
    assert (grad[:, :, 118:] != 0).any(-1).all()  # row 117 sees one key: its weight is 1 whatever happens


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_head(grad_q, device, poison):
    problem = make_problem(SHAPES["self"], device=device, causal=True)
    clean = grad_q(problem)["q"]
    for x in problem.inputs[1:3]:
        x[0, 0, 3, 5] = poison  # the key head of query heads 0 and 1
    problem.grads["output"][0, 3, 69, 2] = poison  # the last row, in a tile that ends beyond the head
    grad = grad_q(problem)["q"]
    assert torch.equal(grad[0, 2], clean[0, 2])
    assert torch.equal(grad[0, 3, :69], clean[0, 3, :69])
    assert not grad[0, 3, 69].isfinite().all()
    assert not grad[0, :2, 64:].isfinite().all(-1).any()


@pytest.mark.gpu
def test_more_than_two_to_the_31_scores(grad_q):
    """With a gradient of one head's last scores alone, dq = s·g·k there, and 0 elsewhere."""
    q, k, v = make_qkv(Case(1, 9, 1, 16384, 16384, 16, False), torch.bfloat16, "cuda")
    scores = torch.zeros(1, 9, 16384, 16384, dtype=torch.bfloat16, device="cuda")
    scores[0, 8, 16000:, 16000:] = torch.randn(384, 384, device="cuda")
    assert scores.numel() > 2**31
    lse = torch.full(q.shape[:3], torch.inf, device="cuda")
    problem = make_problem(Case(1, 1, 1, 1, 1, 16, False), device="cuda")
    grad = grad_q(problem._replace(inputs=(q, k, v, q, lse), grads={"scores": scores}, options={}))["q"]
    expected = scores[0, 8, 16000:, 16000:].double() @ k[0, 0, 16000:].double() / 4
    torch.testing.assert_close(grad[0, 8, 16000:].double(), expected, rtol=2e-2, atol=2e-2)
    assert (grad[0, :8] == 0).all()
    assert (grad[0, 8, :16000] == 0).all()
