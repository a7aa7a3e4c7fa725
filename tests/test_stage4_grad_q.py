"""Stage 4: the gradient of the queries, by a kernel that walks the keys and recomputes their weights."""

import pytest
import torch
from gradient_helpers import LOSSES, SHAPES, Skipped, make_problem
from helpers import CASES, HALF, Case, make_qkv
from test_stage2_features import FEATURES, options_of

from course.largest_tensor import LargestTensor
from stage2_triton_forward.split_kv import attention_forward
from stage4_backward.gradients import Gradients


@pytest.fixture
def grad_q(graded, monkeypatch):
    """The backward pass without the kernel that `test_stage4_grad_kv.py` tests: problem -> gradient of q."""
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    launch = graded("stage4_backward", "launch")
    monkeypatch.setattr(launch, "grad_kv_kernel", Skipped())

    def run(problem):
        return launch.backward(*problem.inputs, Gradients(**problem.grads), **problem.options)[0]

    return run


def check(grad_q, problem):
    problem.check("q", grad_q(problem))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(grad_q, device, case):
    check(grad_q, make_problem(case, device=device, causal=case.causal))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["M < N"]], ids=str)
def test_half_precision(grad_q, device, dtype, case):
    check(grad_q, make_problem(case, dtype, device, causal=case.causal))


@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["M > N"]], ids=["self", "M > N"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_features(grad_q, device, case, feature):
    check(grad_q, make_problem(case, device=device, **options_of(feature, case, device)))


@pytest.mark.parametrize("case", [SHAPES["M < N"], SHAPES["M > N"]], ids=["M < N", "M > N"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses(grad_q, device, case, loss):
    """Through what attention returns beside its output, behind a softcap and a window."""
    check(grad_q, make_problem(case, device=device, loss=loss, causal=True, window=(40, None), softcap=3.0))


@pytest.mark.parametrize("dtype", HALF)
def test_losses_in_half_precision(grad_q, device, dtype):
    check(grad_q, make_problem(SHAPES["self"], dtype, device, LOSSES["everything"], causal=True))


def test_dropout_is_drawn_again(grad_q, device):
    seed = 12345678901  # more than 32 bits
    check(grad_q, make_problem(SHAPES["self"], device=device, causal=True, dropout_p=0.3, seed=seed))


def test_everything_at_once(grad_q, device):
    case = Case(1, 4, 2, 70, 90, 40, True)
    options = {"causal": True, "sm_scale": -0.4, "window": (60, None), "softcap": 5.0, "dropout_p": 0.25, "seed": 99}
    options["sinks"] = torch.randn(4, device=device)
    options["key_padding_mask"] = torch.rand(1, 90, device=device) > 0.2
    check(grad_q, make_problem(case, device=device, loss=LOSSES["everything"], magnitude=3.0, **options))


@pytest.mark.parametrize("width", [9, 100])
def test_values_of_another_width(grad_q, device, width):
    q, k, _ = make_qkv(SHAPES["self"], device=device)
    v = torch.randn(*k.shape[:3], width, device=device)
    check(grad_q, make_problem(SHAPES["self"], device=device, qkv=(q, k, v), causal=True))


@pytest.mark.parametrize("magnitude", [1e-4, 300.0])
def test_magnitudes(grad_q, device, magnitude):
    check(grad_q, make_problem(SHAPES["self"], device=device, magnitude=magnitude, causal=True))


def test_any_strides(grad_q, device):
    packed = torch.randn(1, 70, 3, 4, 20, device=device)  # [B, N, 3, H, D], as fused projections return it
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    k = k[:, :1].expand(-1, 4, -1, -1)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    problem = make_problem(SHAPES["self"], device=device, qkv=(q, k, v), causal=True)
    problem.grads["output"] = problem.grads["output"].transpose(1, 2).contiguous().transpose(1, 2)
    check(grad_q, problem)


def test_expanded_gradients(grad_q, device):
    """What `(output.sum() + scores.sum()).backward()` hands over: one number, seen everywhere."""
    case = SHAPES["self"]
    expanded = make_problem(case, device=device, loss=LOSSES["output and scores"], causal=True)
    for name, x in expanded.grads.items():
        expanded.grads[name] = torch.ones((), device=device).expand(x.shape)
    materialised = expanded._replace(grads={name: x.contiguous() for name, x in expanded.grads.items()})
    assert torch.equal(grad_q(expanded), grad_q(materialised))


def test_unaligned_storage(grad_q, device):
    storage = torch.randn(2 * 70 * 33 + 1, device=device)
    x = storage[1:].view(1, 2, 70, 33)[..., :32]  # neither its address nor its rows' are multiples of 16 bytes
    check(grad_q, make_problem(Case(1, 2, 2, 70, 70, 32, True), device=device, qkv=(x, x.clone(), x), causal=True))


@pytest.mark.parametrize("name", ["output and lse", "everything"])
def test_rows_that_see_nothing(grad_q, device, name):
    problem = make_problem(SHAPES["M > N"], device=device, loss=LOSSES[name], causal=True)
    grad = grad_q(problem)
    assert (grad[:, :, :117] == 0).all()
    assert (grad[:, :, 118:] != 0).any(-1).all()  # row 117 sees one key: its weight is 1 whatever happens


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_head(grad_q, device, poison):
    problem = make_problem(SHAPES["self"], device=device, causal=True)
    clean = grad_q(problem)
    for x in problem.inputs[1:3]:
        x[0, 0, 3, 5] = poison  # the key head of query heads 0 and 1
    problem.grads["output"][0, 3, 69, 2] = poison  # the last row, in a tile that ends beyond the head
    grad = grad_q(problem)
    assert torch.equal(grad[0, 2], clean[0, 2])
    assert torch.equal(grad[0, 3, :69], clean[0, 3, :69])
    assert not grad[0, 3, 69].isfinite().all()
    assert not grad[0, :2, 64:].isfinite().all(-1).any()


def test_empty_tensors(grad_q, device):
    problem = make_problem(Case(1, 2, 1, 5, 5, 16, False), device=device)
    check(grad_q, problem)  # one that is not empty
    for shape in [(0, 2, 2, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)]:
        q, k, _ = make_qkv(Case(*shape, 16, False), device=device)
        output, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=device)
        grad = grad_q(problem._replace(inputs=(q, k, k, output, lse), grads={"output": torch.randn_like(q)}))
        assert grad.shape == q.shape
        assert (grad == 0).all()


def test_same_bits_twice(grad_q, device):
    problem = make_problem(SHAPES["self"], torch.bfloat16, device, LOSSES["everything"], causal=True)
    assert torch.equal(grad_q(problem), grad_q(problem))


def test_finite_differences(grad_q, device):
    """Of the kernels' own forward pass, without any formula: (L(q + εd) - L(q - εd)) / 2ε = ⟨dq, d⟩."""
    q, k, v = make_qkv(Case(1, 2, 1, 20, 36, 16, True), device=device)
    options = {"causal": True, "window": (25, None), "softcap": 4.0, "dropout_p": 0.2, "seed": 3}
    output, lse = attention_forward(q, k, v, **options)
    grads = {"output": torch.randn_like(output), "lse": torch.randn_like(lse)}

    def loss(q):
        results = attention_forward(q, k, v, **options)
        return sum((x.double() * g).sum() for x, g in zip(results, grads.values(), strict=True))

    problem = make_problem(Case(1, 2, 1, 20, 36, 16, True), device=device)
    grad = grad_q(problem._replace(inputs=(q, k, v, output, lse), grads=grads, options=options))
    for _ in range(3):
        step = torch.randn_like(q) * 1e-2
        expected = (loss(q + step) - loss(q - step)) / 2
        torch.testing.assert_close((grad.double() * step).sum(), expected, rtol=1e-3, atol=1e-4)


def test_never_makes_the_matrix(grad_q, device):
    problem = make_problem(Case(1, 2, 1, 200, 200, 16, True), device=device, loss=LOSSES["query heads"], causal=True)
    with LargestTensor() as largest:
        grad_q(problem)
    assert largest.bytes <= 4 * problem.inputs[0].numel(), f"{largest.bytes} bytes were allocated"


@pytest.mark.gpu
def test_more_than_two_to_the_31_scores(grad_q):
    """With a gradient of one head's last scores alone, dq = s·g·k there, and 0 elsewhere."""
    q, k, v = make_qkv(Case(1, 9, 1, 16384, 16384, 16, False), torch.bfloat16, "cuda")
    scores = torch.zeros(1, 9, 16384, 16384, dtype=torch.bfloat16, device="cuda")
    scores[0, 8, 16000:, 16000:] = torch.randn(384, 384, device="cuda")
    assert scores.numel() > 2**31
    lse = torch.full(q.shape[:3], torch.inf, device="cuda")
    problem = make_problem(Case(1, 1, 1, 1, 1, 16, False), device="cuda")
    grad = grad_q(problem._replace(inputs=(q, k, v, q, lse), grads={"scores": scores}, options={}))
    expected = scores[0, 8, 16000:, 16000:].double() @ k[0, 0, 16000:].double() / 4
    torch.testing.assert_close(grad[0, 8, 16000:].double(), expected, rtol=2e-2, atol=2e-2)
    assert (grad[0, :8] == 0).all()
    assert (grad[0, 8, :16000] == 0).all()
