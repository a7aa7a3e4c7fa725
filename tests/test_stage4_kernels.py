"""Stage 4: both gradient kernels, by what holds for either: the gradients of queries, and of keys and values."""

import pytest
import torch
from gradient_helpers import LOSSES, SHAPES, Kernel, Loss, make_problem
from helpers import CASES, HALF, Case, make_qkv
from test_stage2_features import FEATURES, options_of

from course.largest_tensor import LargestTensor
from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward.split_kv import attention_forward


@pytest.fixture(params=["grad_q", "grad_kv"])
def kernel(request, graded, monkeypatch):
    return Kernel(request.param, graded("stage4_backward", "launch"), monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(kernel, device, case):
    kernel.check(make_problem(case, device=device, causal=case.causal))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["M < N"]], ids=str)
def test_half_precision(kernel, device, dtype, case):
    kernel.check(make_problem(case, dtype, device, causal=case.causal))


@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["M > N"]], ids=["self", "M > N"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_features(kernel, device, case, feature):
    kernel.check(make_problem(case, device=device, **options_of(feature, case, device)))


@pytest.mark.parametrize("case", [SHAPES["M < N"], SHAPES["M > N"]], ids=["M < N", "M > N"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses(kernel, device, case, loss):
    """Through what attention returns beside its output, behind a softcap and a window."""
    kernel.check(make_problem(case, device=device, loss=loss, causal=True, window=(40, None), softcap=3.0))


@pytest.mark.parametrize("dtype", HALF)
def test_losses_in_half_precision(kernel, device, dtype):
    kernel.check(make_problem(SHAPES["self"], dtype, device, LOSSES["everything"], causal=True))


@pytest.mark.parametrize("magnitude", [1e-4, 30.0])
def test_entropies_of_logits_that_hardly_differ_and_of_large_ones(kernel, device, magnitude):
    """At 30 most weights are 0, and so is what their logarithm is multiplied by."""
    problem = make_problem(SHAPES["self"], device=device, loss=LOSSES["entropy"], magnitude=magnitude, causal=True)
    kernel.check(problem)


@pytest.mark.parametrize("loss", [LOSSES["output and entropy"], LOSSES["everything"]], ids=["entropy", "everything"])
def test_entropies_of_rows_whose_sinks_take_weight(kernel, device, loss):
    sinks = torch.tensor([3.0, -1.0, 0.5, 2.0], device=device)
    kernel.check(make_problem(SHAPES["self"], device=device, loss=loss, causal=True, softcap=2.0, sinks=sinks))


def test_dropout_is_drawn_again(kernel, device):
    seed = 12345678901  # more than 32 bits
    kernel.check(make_problem(SHAPES["self"], device=device, causal=True, dropout_p=0.3, seed=seed))


def test_entropies_are_those_before_dropout(kernel, device):
    loss = LOSSES["output and entropy"]
    kernel.check(make_problem(SHAPES["self"], device=device, loss=loss, causal=True, dropout_p=0.3, seed=3))


def test_everything_at_once(kernel, device):
    case = Case(1, 4, 2, 70, 90, 40, True)
    options = {"causal": True, "sm_scale": -0.4, "window": (60, None), "softcap": 5.0, "dropout_p": 0.25, "seed": 99}
    options["sinks"] = torch.randn(4, device=device)
    options["key_padding_mask"] = torch.rand(1, 90, device=device) > 0.2
    kernel.check(make_problem(case, device=device, loss=LOSSES["everything"], magnitude=3.0, **options))


@pytest.mark.parametrize("width", [9, 100])
def test_values_of_another_width(kernel, device, width):
    q, k, _ = make_qkv(SHAPES["self"], device=device)
    v = torch.randn(*k.shape[:3], width, device=device)
    kernel.check(make_problem(SHAPES["self"], device=device, qkv=(q, k, v), causal=True))


@pytest.mark.parametrize("magnitude", [1e-4, 300.0])
def test_magnitudes(kernel, device, magnitude):
    kernel.check(make_problem(SHAPES["self"], device=device, magnitude=magnitude, causal=True))


def test_any_strides(kernel, device):
    packed = torch.randn(1, 70, 3, 4, 20, device=device)  # [B, N, 3, H, D], as fused projections return it
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    k = k[:, :1].expand(-1, 4, -1, -1)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    problem = make_problem(SHAPES["self"], device=device, qkv=(q, k, v), causal=True)
    problem.grads["output"] = problem.grads["output"].transpose(1, 2).contiguous().transpose(1, 2)
    kernel.check(problem)


def test_expanded_gradients(kernel, device):
    """What `(output.sum() + scores.sum()).backward()` hands over: one number, seen everywhere."""
    case = SHAPES["self"]
    expanded = make_problem(case, device=device, loss=LOSSES["output and scores"], causal=True)
    for name, x in expanded.grads.items():
        expanded.grads[name] = torch.ones((), device=device).expand(x.shape)
    materialised = expanded._replace(grads={name: x.contiguous() for name, x in expanded.grads.items()})
    for name, grad in kernel(expanded).items():
        assert torch.equal(grad, kernel(materialised)[name])


def test_unaligned_storage(kernel, device):
    storage = torch.randn(2 * 70 * 33 + 1, device=device)
    x = storage[1:].view(1, 2, 70, 33)[..., :32]  # neither its address nor its rows' are multiples of 16 bytes
    kernel.check(make_problem(Case(1, 2, 2, 70, 70, 32, True), device=device, qkv=(x, x.clone(), x), causal=True))


def test_empty_tensors(kernel, device):
    problem = make_problem(Case(1, 2, 1, 5, 5, 16, False), device=device)
    kernel.check(problem)  # one that is not empty
    for shape in [(0, 2, 2, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)]:
        q, k, _ = make_qkv(Case(*shape, 16, False), device=device)
        output, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=device)
        empty = problem._replace(inputs=(q, k, k, output, lse), grads={"output": torch.randn_like(q)})
        for name, grad in kernel(empty).items():
            assert grad.shape == {"q": q, "k": k, "v": k}[name].shape
            assert (grad == 0).all()


def test_same_bits_twice(kernel, device):
    problem = make_problem(SHAPES["self"], torch.bfloat16, device, LOSSES["everything"], causal=True)
    first, second = kernel(problem), kernel(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_never_makes_the_matrix(kernel, device):
    loss = Loss(("total_attention", "entropy"))
    problem = make_problem(Case(1, 2, 1, 200, 200, 16, True), device=device, loss=loss, causal=True)
    with LargestTensor() as largest:
        kernel(problem)
    assert largest.bytes <= 4 * problem.inputs[0].numel(), f"{largest.bytes} bytes were allocated"


def test_finite_differences(kernel, device):
    """Of the kernels' own forward pass, without any formula: (L(x + εd) - L(x - εd)) / 2ε = ⟨dx, d⟩."""
    case = Case(1, 2, 1, 20, 36, 16, True)
    inputs = dict(zip("qkv", make_qkv(case, device=device), strict=True))
    setting = Setting(causal=True, window=(25, None), softcap=4.0, dropout_p=0.2, seed=3)
    results = attention_forward(**inputs, setting=setting)
    grads = {"output": torch.randn_like(results[0]), "lse": torch.randn_like(results[1])}

    def loss(**changed):
        results = attention_forward(**(inputs | changed), setting=setting)
        return sum((x.double() * g).sum() for x, g in zip(results, grads.values(), strict=True))

    problem = make_problem(case, device=device)
    problem = problem._replace(inputs=(*inputs.values(), *results), grads=grads, options=setting._asdict())
    for name, grad in kernel(problem).items():
        for _ in range(2):
            step = torch.randn_like(inputs[name]) * 1e-2
            expected = (loss(**{name: inputs[name] + step}) - loss(**{name: inputs[name] - step})) / 2
            torch.testing.assert_close((grad.double() * step).sum(), expected, rtol=1e-3, atol=1e-4)
