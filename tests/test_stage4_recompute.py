"""Stage 4: the backward pass in PyTorch, which recomputes the weights tile by tile from the lse."""

import shutil
import warnings

import pytest
import torch
from gradient_helpers import INPUTS, LOSSES, OUTPUT, SHAPES, Loss, make_problem
from helpers import CASES, HALF, Case, make_qkv
from test_stage2_features import FEATURES, options_of

from course.largest_tensor import LargestTensor
from stage1_pytorch_tiled.setting import Setting
from stage4_backward.gradients import Gradients

RAW_SUMS = {
    "row sums": Loss(("row_sum",)),
    "column sums": Loss(("col_sum",)),
    "cross-token raw sums": Loss(("col_sum",), (17, None, 17)),
    "all sums": Loss(("output", "lse", "scores", "row_sum", "col_sum", "softmax_col_sum"), (9, None, 20)),
}
TILES = {"block_m": 32, "block_n": 16}

each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


@pytest.fixture
def recompute(graded):
    module = graded("stage4_backward", "recompute_pytorch")

    def run(problem, **tiles):
        return module.recompute_backward(
            *problem.inputs, Gradients(**problem.grads), Setting(**problem.options), **tiles
        )

    return run


def check(recompute, problem, **tiles):
    results = dict(zip(INPUTS, recompute(problem, **tiles), strict=True))
    for name in problem.oracle:
        problem.check(name, results.pop(name))
    assert all(x is None for x in results.values()), "sinks were not given, and have no gradient"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(recompute, case):
    check(recompute, make_problem(case, causal=case.causal))
    check(recompute, make_problem(case, causal=case.causal), block_m=16, block_n=24)


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
@pytest.mark.parametrize("case", [SHAPES["self"], SHAPES["M < N"], CASES[-1]], ids=str)
def test_dtypes(recompute, dtype, case):
    check(recompute, make_problem(case, dtype, loss=LOSSES["everything"], causal=case.causal))


@each_shape
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_features(recompute, case, feature):
    check(recompute, make_problem(case, **options_of(feature, case, "cpu")), **TILES)


@each_shape
@pytest.mark.parametrize("loss", (LOSSES | RAW_SUMS).values(), ids=LOSSES | RAW_SUMS)
def test_losses(recompute, case, loss):
    """Every field of `Gradients`, alone and together, behind a softcap, a window and sinks."""
    options = {"causal": True, "window": (40, None), "softcap": 3.0, "sinks": torch.randn(case.n_heads)}
    check(recompute, make_problem(case, loss=loss, **options), **TILES)


def test_dropout_is_drawn_again(recompute):
    problem = make_problem(SHAPES["self"], causal=True, dropout_p=0.3, seed=12345678901)
    check(recompute, problem, **TILES)
    other = problem._replace(options=problem.options | {"seed": 5})
    assert not torch.allclose(recompute(other)[2], recompute(problem)[2])


def test_everything_at_once(recompute):
    case = Case(2, 4, 2, 70, 90, 40, True)
    options = {"causal": True, "sm_scale": -0.4, "window": (60, None), "softcap": 5.0, "dropout_p": 0.25, "seed": 99}
    options["sinks"], options["key_padding_mask"] = torch.randn(4), torch.rand(2, 90) > 0.2
    check(recompute, make_problem(case, loss=RAW_SUMS["all sums"], magnitude=3.0, **options), **TILES)


@pytest.mark.parametrize("magnitude", [1e-4, 300.0])
@pytest.mark.parametrize("name", ["output", "entropy"])
def test_magnitudes(recompute, magnitude, name):
    """Weights that hardly differ, and ones of 0 whose logarithm is beyond what fp32 tells from it."""
    check(recompute, make_problem(SHAPES["self"], magnitude=magnitude, loss=LOSSES.get(name, OUTPUT), causal=True))


def test_any_strides(recompute):
    q, k, v = torch.randn(1, 70, 3, 4, 20).permute(2, 0, 3, 1, 4)  # [B, N, 3, H, D], as fused projections return it
    k = k[:, :1].expand(-1, 4, -1, -1)
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    problem = make_problem(SHAPES["self"], qkv=(q, k, v), causal=True)
    problem.grads["output"] = problem.grads["output"].transpose(1, 2).contiguous().transpose(1, 2)
    check(recompute, problem)


@pytest.mark.parametrize("name", ["output and lse", "entropy", "everything"])
def test_rows_that_see_nothing(recompute, name):
    sinks = torch.randn(2)
    problem = make_problem(SHAPES["M > N"], loss=LOSSES[name], causal=True, sinks=sinks)
    grad_q, *others = recompute(problem)
    assert (grad_q[:, :, :117] == 0).all()
    for name in ("output", "lse", "scores", "entropy"):
        if name in problem.grads:
            problem.grads[name][:, :, :117] = 1e6
    for grad, same in zip(recompute(problem), (grad_q, *others), strict=True):
        assert torch.equal(grad, same)


def test_empty_tensors(recompute):
    problem = make_problem(Case(1, 2, 1, 5, 5, 16, False))
    check(recompute, problem)  # one that is not empty
    for shape in [(0, 2, 2, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)]:
        q, k, _ = make_qkv(Case(*shape, 16, False))
        inputs = (q, k, k, torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf))
        grads = recompute(problem._replace(inputs=inputs, grads={"output": torch.randn_like(q)}))
        for grad, x in zip(grads, (q, k, k), strict=False):
            assert torch.equal(grad, torch.zeros_like(x))


def test_never_makes_the_matrix(recompute):
    q, k, v = make_qkv(Case(1, 2, 1, 1024, 1024, 16, True))
    inputs = (q, k, v, torch.randn_like(q), torch.full(q.shape[:3], 8.0))
    grads = {"output": torch.randn_like(q), "softmax_col_sum": torch.randn(1, 1, 1024), "lse": torch.randn(1, 2, 1024)}
    grads["entropy"] = torch.randn(1, 2, 1024)
    problem = make_problem(Case(1, 1, 1, 1, 1, 1, True))._replace(inputs=inputs, grads=grads)
    with LargestTensor() as largest:
        recompute(problem._replace(options={"causal": True, "window": (300, None)}))
    assert largest.bytes <= 4 * q.numel(), f"{largest.bytes} bytes were allocated"


def test_same_bits_twice(recompute):
    problem = make_problem(SHAPES["self"], loss=RAW_SUMS["all sums"], causal=True)
    for first, second in zip(recompute(problem)[:3], recompute(problem)[:3], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_of_the_function(graded, is_causal):
    function = graded("stage4_backward", "autograd").FlashAttentionPyTorchFunc
    q, k, v = (x.requires_grad_() for x in make_qkv(Case(1, 2, 1, 5, 7, 3, True), torch.float64))
    assert torch.autograd.gradcheck(function.apply, (q, k, v, is_causal))
    assert torch.autograd.gradcheck(function.apply, (q[:, 0], k[:, 0], v[:, 0], is_causal))


@pytest.mark.parametrize(
    "loss", [OUTPUT, RAW_SUMS["all sums"], LOSSES["entropy"]], ids=["output", "all sums", "entropy"]
)
def test_many_tiles_are_compiled(recompute, graded, monkeypatch, loss):
    """Where there are many, the step is `torch.compile`d; here it is only traced, into few graphs for all shapes."""
    module = graded("stage4_backward", "recompute_pytorch")
    problem = make_problem(Case(1, 2, 1, 70, 90, 16, True), loss=loss, causal=True)
    eager = recompute(problem, **TILES)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compile_step = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_step(f, backend=backend, **options))
    monkeypatch.setattr(module, "_WORTH_COMPILING", 1)
    module.tile_step.cache_clear()
    torch._dynamo.reset()
    compiled = recompute(problem, **TILES)
    module.tile_step.cache_clear()
    assert 0 < len(graphs) < torch._dynamo.config.recompile_limit / 2, f"{len(graphs)} graphs were compiled"
    for actual, expected in zip(compiled[:3], eager[:3], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.thorough
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compiled_and_eager_step_agree(graded):
    module = graded("stage4_backward", "recompute_pytorch")
    logits, row_lse, delta = torch.randn(1, 2, 2, 20, 24), torch.randn(1, 2, 2, 20, 1), torch.randn(1, 2, 2, 20, 1)
    tile = (logits, row_lse, torch.randn(1, 2, 2, 20, 8), torch.randn(1, 2, 1, 24, 8), delta, 0.0, None)
    expected = module.tile_gradients(*tile)
    for actual, eager in zip(module.tile_step("cpu")(*tile), expected, strict=True):
        torch.testing.assert_close(actual, eager, rtol=1e-5, atol=1e-4)


def test_without_a_compiler_it_says_so_once(recompute, graded, monkeypatch):
    module = graded("stage4_backward", "recompute_pytorch")
    problem = make_problem(Case(1, 2, 1, 70, 90, 16, True), causal=True)
    expected = recompute(problem, **TILES)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "_WORTH_COMPILING", 1)
    module.tile_step.cache_clear()
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler found: the backward pass in PyTorch runs eagerly"):
        first = recompute(problem, **TILES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute(problem, **TILES)
    module.tile_step.cache_clear()
    for actual, same in zip(first[:3], expected[:3], strict=True):
        assert torch.equal(actual, same)
