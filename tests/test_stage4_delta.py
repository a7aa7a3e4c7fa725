"""Stage 4: delta, the one number per query that the gradient of a softmax subtracts, and what else depends on it."""

import pytest
import torch
from gradient_helpers import LOSSES, OUTPUT, Loss, Skipped, kept_weights, make_problem
from helpers import CASES, HALF, Case, make_qkv

from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.setting import Setting
from stage4_backward.gradients import Gradients

SELF = Case(2, 2, 1, 70, 70, 32, True)
EMPTY_ROWS = Case(1, 2, 1, 90, 33, 24, True)


@pytest.fixture
def backward(graded, monkeypatch):
    """The backward pass without its two big kernels; `backward.delta()` is what it gave them."""
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    launch = graded("stage4_backward", "launch")
    kernel = Skipped()
    monkeypatch.setattr(launch, "grad_q_kernel", kernel)
    monkeypatch.setattr(launch, "grad_kv_kernel", kernel)

    def run(problem):
        return launch.backward(*problem.inputs, Gradients(**problem.grads), Setting(**problem.options))

    run.delta = lambda: kernel.arguments[7]
    return run


def expected_delta(problem):
    """Return rowsum(dO ∘ O) + Σ_j P_ij·g_ij - dlse_i in float64, [B, Hq, M]; g_ij: of column sums and entropies."""
    q, k, v, output, lse = (x.double() for x in problem.inputs)
    grads = Gradients(**problem.grads)
    delta = torch.zeros_like(lse)
    if grads.output is not None:
        delta += (grads.output.double() * output).sum(-1)
    if grads.lse is not None:
        delta -= grads.lse
    options = {name: x for name, x in problem.options.items() if name not in ("dropout_p", "seed")}
    if grads.entropy is not None:
        result = naive_attention(q, k, v, **options)
        delta += grads.entropy.double() * (result.entropy - result.weights.sum(-1))
    if grads.softmax_col_sum is not None:
        weights = naive_attention(q, k, v, **options).weights[:, :, grads.q_begin : grads.q_stop]
        columns = grads.softmax_col_sum.double()
        columns = columns.repeat_interleave(q.shape[1] // columns.shape[1], dim=1)
        delta[:, :, grads.q_begin : grads.q_stop] += (weights[..., : columns.shape[2]] * columns[:, :, None]).sum(-1)
    return delta


def check(backward, problem):
    backward(problem)
    delta = backward.delta()
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), expected_delta(problem), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(backward, device, case):
    check(backward, make_problem(case, device=device, causal=case.causal))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SELF, CASES[12]], ids=str)
def test_products_of_half_precision_are_added_up_in_fp32(backward, device, dtype, case):
    check(backward, make_problem(case, dtype, device, causal=case.causal))


@pytest.mark.parametrize("case", [SELF, EMPTY_ROWS], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_what_else_hangs_on_the_normaliser(backward, device, name, case):
    check(backward, make_problem(case, device=device, loss=LOSSES[name], causal=True, window=(40, None)))


def test_weights_through_softcap_and_padding(backward, device):
    real = torch.rand(2, 70, device=device) > 0.3
    loss = Loss(("output", "total_attention", "entropy"), (9, 60, 50))
    check(backward, make_problem(SELF, device=device, loss=loss, softcap=2.0, key_padding_mask=real))


def test_it_is_the_mean_of_the_gradient_of_the_weights(backward, device):
    """Σ_d dO_id·O_id = Σ_j P_ij·dP_ij: the softmax's backward pass without its row of weights. Dropout included."""
    problem = make_problem(SELF, device=device, causal=True, dropout_p=0.3, seed=5)
    backward(problem)
    q, k, v = (x.double() for x in problem.inputs[:3])
    weights = naive_attention(q, k, v, True).weights
    grad_weights = problem.grads["output"].double() @ v.repeat_interleave(2, 1).mT * kept_weights(q, k, 0.3, 5) / 0.7
    torch.testing.assert_close(backward.delta().double(), (weights * grad_weights).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "unaligned"])
def test_any_strides_of_the_gradient(backward, device, layout):
    problem = make_problem(SELF, device=device, causal=True)
    shape = problem.inputs[3].shape
    if layout == "expanded":  # what output.sum().backward() gives
        grad = torch.ones((), device=device).expand(shape)
    elif layout == "transposed":
        grad = torch.randn(2, 32, 70, 2, device=device).permute(0, 3, 2, 1)
    else:
        grad = torch.randn(2 * 2 * 70 * 33 + 1, device=device)[1:].view(2, 2, 70, 33)[..., :32]
    check(backward, problem._replace(grads={"output": grad}))


def test_rows_that_see_nothing(backward, device):
    problem = make_problem(EMPTY_ROWS, device=device, causal=True)
    backward(problem)
    assert (backward.delta()[:, :, :57] == 0).all()
    assert (backward.delta()[:, :, 57:] != 0).all()


def test_poison_stays_in_its_head(backward, device):
    problem = make_problem(SELF, device=device, causal=True)
    backward(problem)
    clean = backward.delta()
    problem.grads["output"][1, 1, 69, 3] = torch.nan  # the last row, in a tile that ends beyond the head
    backward(problem)
    poisoned = backward.delta()
    assert poisoned[1, 1, 69].isnan()
    clean[1, 1, 69] = poisoned[1, 1, 69] = 0
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("case", [SELF, EMPTY_ROWS], ids=str)
@pytest.mark.parametrize("name", ["output", "lse", "output and softmax sums", "entropy", "everything"])
def test_gradient_of_sinks(backward, device, case, name):
    """A sink has no value: all that it gets is minus what the others of its row get on average."""
    sinks = torch.randn(2, device=device)
    problem = make_problem(case, device=device, loss=LOSSES.get(name, OUTPUT), causal=True, sinks=sinks)
    problem.check("sinks", backward(problem)[3])


def test_same_bits_twice(backward, device):
    problem = make_problem(SELF, torch.float16, device, LOSSES["everything"], causal=True)
    backward(problem)
    first = backward.delta()
    backward(problem)
    assert torch.equal(first, backward.delta())


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(backward):
    q, k, v = make_qkv(Case(1, 1, 1, 1, 1, 64, False), torch.float16, "cuda")
    grad = torch.zeros(1, device="cuda", dtype=torch.float16).expand(9, 60, 65536, 64).contiguous()
    grad[8, 59] = torch.randn(65536, 64, device="cuda").half()
    assert grad.numel() > 2**31
    output = q.expand(9, 60, 65536, 64)
    lse = torch.zeros(9, 60, 65536, device="cuda")
    inputs = (output, k.expand(9, 1, 128, 64), v.expand(9, 1, 128, 64), output, lse)
    problem = make_problem(Case(1, 1, 1, 1, 1, 64, False), device="cuda")
    backward(problem._replace(inputs=inputs, grads={"output": grad}, options={}))
    expected = (grad[8, 59].double() * q[0, 0].double()).sum(-1)
    torch.testing.assert_close(backward.delta()[8, 59].double(), expected, rtol=1e-4, atol=1e-4)
    assert (backward.delta()[:8] == 0).all()
