"""Stage 4: the gradients of keys and values, by a kernel that walks the queries of all heads of a group."""

import pytest
import torch
from gradient_helpers import LOSSES, SHAPES, Skipped, make_problem
from helpers import CASES, HALF, Case, make_qkv
from test_stage2_features import FEATURES, options_of

from course.largest_tensor import LargestTensor
from stage2_triton_forward.split_kv import attention_forward
from stage4_backward.gradients import Gradients


@pytest.fixture
def grad_kv(graded, monkeypatch):
    """The backward pass without the kernel that `test_stage4_grad_q.py` tests: problem -> gradients of k and v."""
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    launch = graded("stage4_backward", "launch")
    monkeypatch.setattr(launch, "grad_q_kernel", Skipped())

    def run(problem):
        return launch.backward(*problem.inputs, Gradients(**problem.grads), **problem.options)[1:3]

    return run


def check(grad_kv, problem):
    grad_k, grad_v = grad_kv(problem)
    problem.check("v", grad_v)
    problem.check("k", grad_k)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(grad_kv, device, case):
    check(grad_kv, make_problem(case, device=device, causal=case.causal))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["M < N"]], ids=str)
def test_half_precision(grad_kv, device, dtype, case):
    check(grad_kv, make_problem(case, dtype, device, causal=case.causal))


@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["M > N"]], ids=["self", "M > N"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_features(grad_kv, device, case, feature):
    check(grad_kv, make_problem(case, device=device, **options_of(feature, case, device)))


@pytest.mark.parametrize("case", [SHAPES["M < N"], SHAPES["M > N"]], ids=["M < N", "M > N"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses(grad_kv, device, case, loss):
    """Through what attention returns beside its output, behind a softcap and a window."""
    check(grad_kv, make_problem(case, device=device, loss=loss, causal=True, window=(40, None), softcap=3.0))


@pytest.mark.parametrize("dtype", HALF)
def test_losses_in_half_precision(grad_kv, device, dtype):
    check(grad_kv, make_problem(SHAPES["self"], dtype, device, LOSSES["everything"], causal=True))


def test_dropout_is_drawn_again(grad_kv, device):
    seed = 12345678901  # more than 32 bits
    check(grad_kv, make_problem(SHAPES["self"], device=device, causal=True, dropout_p=0.3, seed=seed))


def test_everything_at_once(grad_kv, device):
    case = Case(1, 4, 2, 70, 90, 40, True)
    options = {"causal": True, "sm_scale": -0.4, "window": (60, None), "softcap": 5.0, "dropout_p": 0.25, "seed": 99}
    options["sinks"] = torch.randn(4, device=device)
    options["key_padding_mask"] = torch.rand(1, 90, device=device) > 0.2
    check(grad_kv, make_problem(case, device=device, loss=LOSSES["everything"], magnitude=3.0, **options))


@pytest.mark.parametrize("width", [9, 100])
def test_values_of_another_width(grad_kv, device, width):
    q, k, _ = make_qkv(SHAPES["self"], device=device)
    v = torch.randn(*k.shape[:3], width, device=device)
    check(grad_kv, make_problem(SHAPES["self"], device=device, qkv=(q, k, v), causal=True))


@pytest.mark.parametrize("magnitude", [1e-4, 300.0])
def test_magnitudes(grad_kv, device, magnitude):
    check(grad_kv, make_problem(SHAPES["self"], device=device, magnitude=magnitude, causal=True))


def test_any_strides(grad_kv, device):
    packed = torch.randn(1, 70, 3, 4, 20, device=device)  # [B, N, 3, H, D], as fused projections return it
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    k = k[:, :1].expand(-1, 4, -1, -1)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    problem = make_problem(SHAPES["self"], device=device, qkv=(q, k, v), causal=True)
    problem.grads["output"] = problem.grads["output"].transpose(1, 2).contiguous().transpose(1, 2)
    check(grad_kv, problem)


def test_expanded_gradients(grad_kv, device):
    """What `(output.sum() + scores.sum()).backward()` hands over: one number, seen everywhere."""
    case = SHAPES["self"]
    expanded = make_problem(case, device=device, loss=LOSSES["output and scores"], causal=True)
    for name, x in expanded.grads.items():
        expanded.grads[name] = torch.ones((), device=device).expand(x.shape)
    materialised = expanded._replace(grads={name: x.contiguous() for name, x in expanded.grads.items()})
    for grad, expected in zip(grad_kv(expanded), grad_kv(materialised), strict=True):
        assert torch.equal(grad, expected)


def test_unaligned_storage(grad_kv, device):
    storage = torch.randn(2 * 70 * 33 + 1, device=device)
    x = storage[1:].view(1, 2, 70, 33)[..., :32]  # neither its address nor its rows' are multiples of 16 bytes
    check(grad_kv, make_problem(Case(1, 2, 2, 70, 70, 32, True), device=device, qkv=(x, x.clone(), x), causal=True))


@pytest.mark.parametrize("name", ["output and lse", "everything"])
def test_rows_that_see_nothing_give_nothing(grad_kv, device, name):
    problem = make_problem(SHAPES["M > N"], device=device, loss=LOSSES[name], causal=True)
    expected = grad_kv(problem)
    for name in ("output", "lse", "scores"):
        if name in problem.grads:
            problem.grads[name][:, :, :117] = 1e6
    for grad, same in zip(grad_kv(problem), expected, strict=True):
        assert torch.equal(grad, same)


def test_keys_that_no_query_sees(grad_kv, device):
    case = SHAPES["M < N"]
    real = torch.ones(case.batch, case.n_k, dtype=torch.bool, device=device)
    real[:, 140] = False
    options = {"causal": True, "window": (8, None), "key_padding_mask": real}
    problem = make_problem(case, device=device, loss=LOSSES["everything"], **options)
    for grad in grad_kv(problem):
        assert (grad[:, :, : 150 - 21 - 8] == 0).all()
        assert (grad[:, :, 140] == 0).all()
        assert (grad[:, :, 141:] != 0).any(-1).all()


def test_query_heads_of_a_group_add_up(grad_kv, device):
    """What a key head gets is the sum of what it would get as a key head for each of its query heads alone."""
    problem = make_problem(SHAPES["self"], device=device, causal=True)
    q, k, v, output, lse = problem.inputs
    apart = problem._replace(inputs=(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), output, lse))
    for grad, of_each in zip(grad_kv(problem), grad_kv(apart), strict=True):
        torch.testing.assert_close(grad, of_each.unflatten(1, (2, 2)).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_head(grad_kv, device, poison):
    case = SHAPES["self"]._replace(n_heads=3, n_kv_heads=3)
    problem = make_problem(case, device=device, causal=True)
    clean = grad_kv(problem)
    problem.inputs[1][0, 0, 3, 5] = poison
    problem.grads["output"][0, 2, 69, 2] = poison  # the last row, in a tile that ends beyond the head
    grad_k, grad_v = grad_kv(problem)
    assert torch.equal(grad_k[0, 1], clean[0][0, 1])
    assert torch.equal(grad_v[0, 1], clean[1][0, 1])
    assert not grad_k[0, 0, 3].isfinite().all()
    assert not grad_k[0, 2].isfinite().all(-1).any()
    assert not grad_v[0, 2, :, 2].isfinite().any()
    assert torch.equal(grad_v[0, 2, :, 3:], clean[1][0, 2, :, 3:])


def test_empty_tensors(grad_kv, device):
    problem = make_problem(Case(1, 2, 1, 5, 5, 16, False), device=device)
    check(grad_kv, problem)  # one that is not empty
    for shape in [(0, 2, 2, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)]:
        q, k, _ = make_qkv(Case(*shape, 16, False), device=device)
        output, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=device)
        for grad in grad_kv(problem._replace(inputs=(q, k, k, output, lse), grads={"output": torch.randn_like(q)})):
            assert grad.shape == k.shape
            assert (grad == 0).all()


def test_same_bits_twice(grad_kv, device):
    problem = make_problem(SHAPES["self"], torch.bfloat16, device, LOSSES["everything"], causal=True)
    for first, second in zip(grad_kv(problem), grad_kv(problem), strict=True):
        assert torch.equal(first, second)


def test_finite_differences(grad_kv, device):
    """Of the kernels' own forward pass, without any formula: (L(k + εd) - L(k - εd)) / 2ε = ⟨dk, d⟩."""
    q, k, v = make_qkv(Case(1, 2, 1, 20, 36, 16, True), device=device)
    options = {"causal": True, "window": (25, None), "softcap": 4.0, "dropout_p": 0.2, "seed": 3}
    output, lse = attention_forward(q, k, v, **options)
    grads = {"output": torch.randn_like(output), "lse": torch.randn_like(lse)}

    def loss(k, v):
        results = attention_forward(q, k, v, **options)
        return sum((x.double() * g).sum() for x, g in zip(results, grads.values(), strict=True))

    problem = make_problem(Case(1, 2, 1, 20, 36, 16, True), device=device)
    grad_k, grad_v = grad_kv(problem._replace(inputs=(q, k, v, output, lse), grads=grads, options=options))
    step = torch.randn_like(k) * 1e-2
    expected = (loss(k + step, v) - loss(k - step, v)) / 2
    torch.testing.assert_close((grad_k.double() * step).sum(), expected, rtol=1e-3, atol=1e-4)
    expected = (loss(k, v + step) - loss(k, v - step)) / 2
    torch.testing.assert_close((grad_v.double() * step).sum(), expected, rtol=1e-3, atol=1e-4)


def test_never_makes_the_matrix(grad_kv, device):
    problem = make_problem(Case(1, 2, 1, 200, 200, 16, True), device=device, loss=LOSSES["query heads"], causal=True)
    with LargestTensor() as largest:
        grad_kv(problem)
    assert largest.bytes <= 4 * problem.inputs[0].numel(), f"{largest.bytes} bytes were allocated"


@pytest.mark.gpu
def test_more_than_two_to_the_31_scores(grad_kv):
    """With a gradient of one head's last scores alone, dk = s·gᵀ·q there, and 0 elsewhere."""
    q, k, v = make_qkv(Case(1, 9, 1, 16384, 16384, 16, False), torch.bfloat16, "cuda")
    scores = torch.zeros(1, 9, 16384, 16384, dtype=torch.bfloat16, device="cuda")
    scores[0, 8, 16000:, 16000:] = torch.randn(384, 384, device="cuda")
    assert scores.numel() > 2**31
    lse = torch.full(q.shape[:3], torch.inf, device="cuda")
    problem = make_problem(Case(1, 1, 1, 1, 1, 16, False), device="cuda")
    grad_k, grad_v = grad_kv(problem._replace(inputs=(q, k, v, q, lse), grads={"scores": scores}, options={}))
    expected = scores[0, 8, 16000:, 16000:].double().mT @ q[0, 8, 16000:].double() / 4
    torch.testing.assert_close(grad_k[0, 0, 16000:].double(), expected, rtol=2e-2, atol=2e-2)
    assert (grad_k[0, 0, :16000] == 0).all()
    assert (grad_v == 0).all()
