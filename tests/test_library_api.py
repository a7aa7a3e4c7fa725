"""The public functions: both backends give the oracle's answer, and bad input is refused before anything runs."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TRITON_MODE
from helpers import Case, assert_right, make_qkv, references
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attention_with_scores as library
from course.largest_tensor import LargestTensor
from flash_attention_with_scores import attention_with_scores, compute_attention_scores

CACHE = Case(2, 4, 2, 40, 130, 24, True)
ROOT = Path(__file__).parent.parent
BACKENDS = ["pytorch", "triton", None]


PROMISED = [
    "attention",
    "attention_with_scores",
    "compute_attention_scores",
    "attention_with_row_sum",
    "attention_with_col_sum",
    "attention_with_col_sum_sequential",
    "attention_with_softmax_col_sum",
    "attention_cross_token_qk_sum",
    "attention_cross_token_softmax_sum",
    "attention_cross_token_softmax_sum_buffered",
    "flash_attention_with_cumulative_scores",
    "FlashAttentionWithAccumulation",
    "replace_attention_with_flash",
    "get_all_cumulative_scores",
    "reset_cumulative_scores",
    "FlashAttentionPyTorchFunc",
    "FlashAttentionTritonFunc",
    "naive_attention",
]
NEEDS_TRANSFORMERS = {"replace_attention_with_flash", "get_all_cumulative_scores", "reset_cumulative_scores"}
IMPORT_ALONE = """
import sys
for name in ("triton", "transformers", "matplotlib"):
    sys.modules[name] = None  # importing it raises ImportError
from flash_attention_with_scores import *
assert set(sys.argv[1:]) <= set(globals()), set(sys.argv[1:]) - set(globals())
q = __import__("torch").randn(1, 2, 5, 8)
assert FlashAttentionPyTorchFunc.apply(q, q, q, True).shape == q.shape
"""


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names_are_importable_and_documented(name):
    if name in NEEDS_TRANSFORMERS:
        pytest.importorskip("transformers", reason="transformers is not installed")
    promised = getattr(library, name)
    assert callable(promised)
    assert inspect.getdoc(promised)
    assert name in dir(library)


def test_every_public_name_exists_and_is_documented():
    for name in library.__all__:
        assert inspect.getdoc(getattr(library, name)), f"{name} has no docstring"


def test_star_import_needs_torch_alone():
    expected = [name for name in PROMISED if name not in NEEDS_TRANSFORMERS]
    run = subprocess.run([sys.executable, "-c", IMPORT_ALONE, *expected], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


LOADS_LITTLE = """
import sys, torch
before = set(sys.modules)
import flash_attention_with_scores
heavy = {"triton", "torch._dynamo", "torch._inductor", "transformers", "matplotlib"} & (set(sys.modules) - before)
assert not heavy, heavy
from stage2_triton_forward.interpreter import use_interpreter_without_gpu
mode = use_interpreter_without_gpu()
q = torch.randn(1, 1, 4, 16)
if mode == "interpreted":
    flash_attention_with_scores.attention(q, q, q, backend="triton")
"""


def test_import_loads_little():
    """Neither Triton nor the compiler: so that Triton can still be switched to its interpreter afterwards."""
    run = subprocess.run([sys.executable, "-c", LOADS_LITTLE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


FUNCTIONS = [name for name in library.__all__ if inspect.isfunction(getattr(library, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_spelled_out(name):
    function = getattr(library, name)
    parameters = inspect.signature(function).parameters.values()
    assert not [x.name for x in parameters if x.kind in (x.VAR_KEYWORD, x.VAR_POSITIONAL)]
    if parameters:
        with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'windwo'"):
            function(windwo=3)


def test_the_two_backends_have_one_face():
    from flash_attention_with_scores import pytorch_backend
    from flash_attention_with_scores.backend import Backend

    backends = [pytorch_backend]
    if TRITON_MODE != "missing":
        from flash_attention_with_scores import triton_backend

        backends.append(triton_backend)
    for name in (name for name in vars(Backend) if not name.startswith("_")):
        expected = [*inspect.signature(getattr(Backend, name)).parameters][1:]
        for backend in backends:
            function = getattr(backend, name)
            arguments = inspect.signature(function).parameters
            takes_any = any(x.kind == x.VAR_KEYWORD for x in arguments.values())  # an operator: its table names them
            assert takes_any or set(expected) <= set(arguments), f"{backend.__name__}.{name}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backends_match_the_oracle(device, backend, dtype):
    q, k, v = make_qkv(CACHE, dtype, device)
    oracle, naive = references(q, k, v, True, 0.3)
    output, scores = attention_with_scores(q, k, v, True, 0.3, backend=backend)
    assert_right("output", output, oracle, naive, dtype=dtype)
    assert_right("scores", scores, oracle, naive, dtype=dtype)
    assert_right("scores", compute_attention_scores(q, k, True, 0.3, backend=backend), oracle, naive, dtype=dtype)


def test_fp64_on_the_pytorch_backend(device):
    q, k, v = make_qkv(CACHE, torch.float64, device)
    oracle, naive = references(q, k, v, True)
    output, scores = attention_with_scores(q, k, v, True, backend="pytorch")
    assert_right("output", output, oracle, naive, dtype=torch.float64)
    assert_right("scores", scores, oracle, naive, dtype=torch.float64)


def test_backends_drop_the_same_weights(device):
    q, k, v = make_qkv(CACHE, device=device)
    outputs = [attention_with_scores(q, k, v, dropout_p=0.4, seed=3, backend=b)[0] for b in ("pytorch", "triton")]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    other_seed, _ = attention_with_scores(q, k, v, dropout_p=0.4, seed=4)
    assert not torch.allclose(outputs[0], other_seed)


def test_dropout_without_a_seed_follows_torch(device):
    q, k, v = make_qkv(CACHE, device=device)
    torch.manual_seed(5)
    first, _ = attention_with_scores(q, k, v, dropout_p=0.4)
    second, _ = attention_with_scores(q, k, v, dropout_p=0.4)
    torch.manual_seed(5)
    again, _ = attention_with_scores(q, k, v, dropout_p=0.4)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)


DRAWING = [name for name in FUNCTIONS if "seed" in inspect.signature(getattr(library, name)).parameters]


@pytest.mark.parametrize("name", DRAWING)
def test_a_seed_that_is_not_given_is_drawn_anew(name):
    q, k, v = make_qkv(Case(1, 2, 1, 9, 13, 16, True))
    arguments = {"q": q, "k": k, "v": v, "dropout_p": 0.5}
    function = getattr(library, name)
    if "split" in inspect.signature(function).parameters:
        arguments["split"] = 5
    if name == "attention_with_reduction":
        arguments["row"] = lambda acc, logits, weights, q_idx, k_idx: acc
    outputs = []
    for drawn in (3, None, 3):
        if drawn is not None:
            torch.manual_seed(drawn)
        output = function(**arguments)
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


def test_sequential_sums_have_the_defaults_of_the_others():
    sequential = inspect.signature(library.attention_with_col_sum_sequential).parameters
    expected = dict(inspect.signature(library.attention_with_col_sum).parameters)
    assert expected.pop("algorithm").default == "linear"
    assert [(x.name, x.kind, x.default) for x in sequential.values()] == [
        (x.name, x.kind, x.default) for x in expected.values()
    ]


def test_kernels_are_imported_once(device, monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from flash_attention_with_scores import problem

    q = torch.zeros(1, 1, 1, 16, device=device)
    first = problem.choose_backend("triton", q)
    monkeypatch.delattr(problem, "_import_kernels")
    assert problem.choose_backend("triton", q) is first


def test_pytorch_backend_is_differentiable():
    q, k, v = (x[:, :, :9].requires_grad_() for x in make_qkv(Case(1, 2, 1, 9, 9, 4, True), torch.float64))

    def loss(q, k, v):
        output, scores = attention_with_scores(q, k, v, True, backend="pytorch")
        return output.square().sum() + scores.sin().sum()

    assert torch.autograd.gradcheck(loss, (q, k, v))


def test_only_the_scores_are_of_quadratic_size():
    q, k, v = make_qkv(Case(1, 2, 2, 3000, 3000, 32, True))
    with LargestTensor() as largest:
        attention_with_scores(q, k, v, True)
    assert largest.bytes == 4 * 2 * 3000 * 3000


def good(**changes):
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    return {"q": q, "k": k, "v": v} | changes


BAD = {
    "q is a list": (TypeError, "q must be a torch.Tensor", good(q=[1.0])),
    "q is 3-D": (ValueError, r"q must be 4-D .* \[4, 8, 16\]", good(q=torch.randn(4, 8, 16))),
    "k is 2-D": (ValueError, r"k must be 4-D", good(k=torch.randn(8, 16))),
    "integers": (
        TypeError,
        "q must be fp16, bf16, fp32 or fp64, got torch.int64",
        good(q=torch.ones(1, 4, 8, 16).long()),
    ),
    "mixed dtypes": (TypeError, "k must have q's dtype", good(k=torch.randn(1, 2, 12, 16).half())),
    "v of another dtype": (TypeError, "v must have k's dtype", good(v=torch.randn(1, 2, 12, 16).double())),
    "mixed devices": (ValueError, "k must be on q's device", good(k=torch.randn(1, 2, 12, 16, device="meta"))),
    "batch sizes": (ValueError, "k must have q's batch size 1, got 3", good(k=torch.randn(3, 2, 12, 16))),
    "head dimensions": (ValueError, "k must have q's head dimension 16, got 8", good(k=torch.randn(1, 2, 12, 8))),
    "head counts": (ValueError, "multiple of k's, got 4 and 3", good(k=torch.randn(1, 3, 12, 16))),
    "no key heads": (ValueError, "multiple of k's, got 4 and 0", good(k=torch.randn(1, 0, 12, 16))),
    "wide heads": (
        ValueError,
        "from 1 to 256, got 300",
        {name: torch.randn(1, 2, 4, 300) for name in ("q", "k", "v")},
    ),
    "no head dimension": (
        ValueError,
        "from 1 to 256, got 0",
        {name: torch.randn(1, 2, 4, 0) for name in ("q", "k", "v")},
    ),
    "v is shorter": (ValueError, "v must have k's batch, heads and length", good(v=torch.randn(1, 2, 11, 16))),
    "causal is an int": (TypeError, "causal must be a bool, got int", good(causal=1)),
    "scale is text": (TypeError, "sm_scale must be a number or None, got str", good(sm_scale="1")),
    "scale is NaN": (ValueError, "sm_scale must be finite, got nan", good(sm_scale=float("nan"))),
    "dropout of 1": (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", good(dropout_p=1.0)),
    "negative dropout": (ValueError, r"dropout_p must be in \[0, 1\), got -0.1", good(dropout_p=-0.1)),
    "dropout is text": (TypeError, "dropout_p must be a number, got str", good(dropout_p="0.1")),
    "negative seed": (ValueError, r"seed must be in \[0, 2\*\*63\), got -1", good(seed=-1)),
    "seed is a float": (TypeError, "seed must be an int or None, got float", good(seed=1.5)),
    "unknown backend": (ValueError, "backend must be one of .* got 'cuda'", good(backend="cuda")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    error, message, arguments = BAD[name]
    with pytest.raises(error, match=message):
        attention_with_scores(**arguments)
    shared = inspect.signature(compute_attention_scores).parameters
    if name.split()[0] != "v" and set(arguments) - {"v"} <= set(shared):
        with pytest.raises(error, match=message):
            compute_attention_scores(**{key: value for key, value in arguments.items() if key in shared})


def test_the_kernels_refuse_fp64(device):
    q, k, v = make_qkv(CACHE, torch.float64, device)
    with pytest.raises(ValueError, match="backend='pytorch'"):
        attention_with_scores(q, k, v, backend="triton")


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)], ids=str)
def test_empty_tensors(device, backend, shape):
    batch, heads, n_q, n_k = shape
    q, k = torch.randn(batch, heads, n_q, 16, device=device), torch.randn(batch, heads, n_k, 16, device=device)
    output, scores = attention_with_scores(q, k, k, backend=backend)
    assert scores.shape == (batch, heads, n_q, n_k)
    torch.testing.assert_close(output.cpu(), torch.zeros(batch, heads, n_q, 16))
    assert compute_attention_scores(q, k, backend=backend).shape == scores.shape


def test_only_plain_calls_pass_the_operators_by():
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward.operators import needs_operator

    q = torch.zeros(1, 1, 2, 16)
    assert not needs_operator(q, q, q, None)
    assert not needs_operator(q, torch.nn.Parameter(q)), "autograd alone needs none"
    with FakeTensorMode() as mode:
        assert needs_operator(mode.from_tensor(q))
        assert needs_operator(q)
    told = []
    torch.func.vmap(lambda x: told.append(needs_operator(x)) or x)(q)
    torch.jit.trace(lambda x: told.append(needs_operator(x)) or x + 1, q, check_trace=False)
    assert told == [True, True]
    compiled = torch.compile(lambda x: x + 1 if needs_operator(x) else x, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q), q + 1)
