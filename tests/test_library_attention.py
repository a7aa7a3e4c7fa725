"""`attention`: every option on both backends, as an operator that PyTorch can compile, and its refusals."""

import pytest
import torch
from helpers import Case, assert_right, make_qkv, references

from course.largest_tensor import LargestTensor
from flash_attention_with_scores import attention

CASE = Case(2, 4, 2, 40, 130, 24, True)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (20, None)},
    "list window": {"window": [30, 5]},
    "window beyond everything": {"causal": True, "window": (2**31 - 1, None)},
    "window beyond 32 bits": {"window": 2**40},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "padding": {"key_padding_mask": True},
}
BACKENDS = ["pytorch", "triton"]


def options_of(name, device):
    options = dict(OPTIONS[name])
    if "sinks" in options:
        options["sinks"] = torch.randn(4, device=device)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = torch.rand(2, 130, device=device) > 0.3
    return options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(device, backend, name):
    q, k, v = make_qkv(CASE, device=device)
    options = options_of(name, device)
    output, lse = attention(q, k, v, **options, return_lse=True, backend=backend)
    oracle, naive = references(q, k, v, **options)
    assert_right("output", output, oracle, naive, dtype=torch.float32)
    assert_right("lse", lse, oracle, naive, dtype=torch.float32)
    assert torch.equal(attention(q, k, v, **options, backend=backend), output)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_reproducible(device, backend):
    q, k, v = make_qkv(CASE, device=device)
    first, lse = attention(q, k, v, dropout_p=0.3, seed=5, return_lse=True, backend=backend)
    again = attention(q, k, v, dropout_p=0.3, seed=5, backend=backend)
    assert torch.equal(first, again)
    other = attention(q, k, v, dropout_p=0.3, seed=5, backend=BACKENDS[backend == "pytorch"])
    torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-4)
    _, undropped = attention(q, k, v, return_lse=True, backend=backend)
    assert torch.equal(lse, undropped)


def test_decoding_agrees_with_the_last_row(device):
    q, k, v = make_qkv(CASE, device=device)
    whole = attention(q, k, v, True, window=(50, None), backend="triton")
    last = attention(q[:, :, -1:], k, v, True, window=(50, None), backend="triton")
    torch.testing.assert_close(last, whole[:, :, -1:], rtol=1e-5, atol=1e-5)


def test_cpu_backend_never_makes_the_matrix():
    q, k, v = make_qkv(Case(1, 2, 1, 4096, 4096, 32, True))
    with LargestTensor() as largest:
        attention(q, k, v, True, window=1000, backend="pytorch")
    assert largest.bytes <= q.element_size() * q.numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0), (1, 2, 1, 0)], ids=str)
def test_empty_tensors(device, backend, shape):
    batch, heads, n_q, n_k = shape
    q, k = torch.randn(batch, heads, n_q, 16, device=device), torch.randn(batch, heads, n_k, 16, device=device)
    output, lse = attention(q, k, k, return_lse=True, backend=backend)
    torch.testing.assert_close(output.cpu(), torch.zeros(batch, heads, n_q, 16))
    torch.testing.assert_close(lse.cpu(), torch.full((batch, heads, n_q), -torch.inf))


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_fp8_descales(device, kind):
    q, k, v = (x.to(torch.float8_e4m3fn) for x in make_qkv(CASE, device=device))
    descales = (0.5, 2.0, 3.0) if kind == "float" else tuple(torch.tensor([x], device=device) for x in (0.5, 2.0, 3.0))
    plain, scaled = attention(q, k, v, backend="triton"), attention(q, k, v, descales=descales, backend="triton")
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(scaled, 3 * plain, rtol=1e-2, atol=1e-2)


def test_opcheck(device):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward.operators import attention as operator

    q, k, v = make_qkv(Case(1, 2, 1, 5, 9, 16, True), device=device)
    arguments = (q, k, v, True, 0.25, 0.0, 0, 3, None, None, None, None, None)
    torch.library.opcheck(operator.op, arguments)


def test_compiles_into_one_graph(device):
    q, k, v = make_qkv(CASE, device=device)

    def block(q, k, v):
        return attention(q * 2, k, v, causal=True, backend="triton") + 1

    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(q, k, v), block(q, k, v))


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    for n_q in (1, 64):
        q, k, v = make_qkv(Case(1, 4, 2, n_q, 4096, 64, True), torch.bfloat16, "cuda")
        attention(q, k, v, True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = attention(q, k, v, True)
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(output, attention(q, k, v, True))


@pytest.mark.gpu
def test_memory_is_linear():
    q, k, v = make_qkv(Case(1, 8, 8, 32768, 32768, 64, True), torch.bfloat16, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = attention(q, k, v, True)
    beyond = torch.cuda.max_memory_allocated() - before - output.numel() * output.element_size()
    assert beyond < 8 * 32768 * 4 * 2  # an lse, and as much again


def good(**changes):
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    return {"q": q, "k": k, "v": v} | changes


BAD = {
    "negative window": (ValueError, "window must not be negative, got -1", good(window=-1)),
    "negative side": (ValueError, r"window must not be negative, got \(3, -2\)", good(window=(3, -2))),
    "window of text": (TypeError, "window must be an int", good(window="3")),
    "window of three": (TypeError, "window must be an int", good(window=(1, 2, 3))),
    "softcap of 0": (ValueError, "softcap must be above 0, got 0", good(softcap=0)),
    "softcap of text": (TypeError, "softcap must be a number, got str", good(softcap="1")),
    "sinks of integers": (TypeError, "sinks must be a floating-point tensor", good(sinks=torch.zeros(4).long())),
    "sinks of another length": (ValueError, r"sinks must have shape \[4\], got \[2\]", good(sinks=torch.zeros(2))),
    "mask of floats": (TypeError, "key_padding_mask must be a bool tensor", good(key_padding_mask=torch.ones(1, 12))),
    "mask of another shape": (
        ValueError,
        r"key_padding_mask must have shape \[1, 12\], got \[12\]",
        good(key_padding_mask=torch.ones(12).bool()),
    ),
    "mask elsewhere": (
        ValueError,
        "key_padding_mask must be on q's device",
        good(key_padding_mask=torch.ones(1, 12, device="meta").bool()),
    ),
    "values of another length": (
        ValueError,
        "v must have k's batch, heads and length",
        good(v=torch.randn(1, 2, 11, 16)),
    ),
    "wide values": (ValueError, "v's head dimension must be from 1 to 256", good(v=torch.randn(1, 2, 12, 257))),
    "dropout of 1": (ValueError, r"dropout_p must be in \[0, 1\)", good(dropout_p=1.0)),
    "dropout of NaN": (ValueError, "dropout_p must be finite", good(dropout_p=float("nan"))),
    "integers": (TypeError, "q must be fp16, bf16, fp32 or fp64 or fp8", good(q=torch.ones(1, 4, 8, 16).int())),
    "descales without fp8": (ValueError, "descales go with fp8 inputs only", good(descales=(1, 1, 1))),
    "fp8 on the PyTorch backend": (
        ValueError,
        "backend='pytorch' takes fp16, bf16, fp32 or fp64",
        {name: x.to(torch.float8_e4m3fn) for name, x in good().items()},
    ),
    "a negative descale": (
        ValueError,
        "descales: k's must be above 0, got -1.0",
        {name: x.to(torch.float8_e4m3fn) for name, x in good().items()} | {"descales": (1.0, -1.0, 1.0)},
    ),
    "two descales": (
        TypeError,
        "descales must be three numbers",
        {name: x.to(torch.float8_e4m3fn) for name, x in good().items()} | {"descales": (1.0, 1.0)},
    ),
    "a descale of 0": (
        ValueError,
        "descales: q's must be above 0, got 0",
        {name: x.to(torch.float8_e4m3fn) for name, x in good().items()} | {"descales": (0, 1.0, 1.0)},
    ),
    "a descale for each head": (
        ValueError,
        r"descales: v's must have one element, got shape \[2\]",
        {name: x.to(torch.float8_e4m3fn) for name, x in good().items()} | {"descales": (1.0, 1.0, torch.ones(2))},
    ),
    "one descale": (
        TypeError,
        "descales must be three numbers",
        {name: x.to(torch.float8_e4m3fn) for name, x in good().items()} | {"descales": 1.0},
    ),
    "a bool in a window": (TypeError, "window must be an int", good(window=(True, 3))),
    "a negative softcap": (ValueError, "softcap must be above 0, got -2.0", good(softcap=-2.0)),
    "sinks in a list": (TypeError, "sinks must be a floating-point tensor or None, got list", good(sinks=[0.0] * 4)),
    "sinks elsewhere": (ValueError, "sinks must be on q's device", good(sinks=torch.zeros(4, device="meta"))),
    "mask in a list": (TypeError, "key_padding_mask must be a bool tensor", good(key_padding_mask=[True] * 12)),
    "a scale of True": (TypeError, "sm_scale must be a number or None, got bool", good(sm_scale=True)),
    "a seed of True": (TypeError, "seed must be an int or None, got bool", good(seed=True)),
    "a seed of 64 bits": (ValueError, r"seed must be in \[0, 2\*\*63\), got 9223372036854775808", good(seed=2**63)),
    "values without width": (ValueError, "v's head dimension must be from 1 to 256", good(v=torch.randn(1, 2, 12, 0))),
    "values of another head count": (
        ValueError,
        "v must have k's batch, heads and length",
        good(v=torch.randn(1, 1, 12, 16)),
    ),
    "values elsewhere": (ValueError, "v must be on k's device", good(v=torch.randn(1, 2, 12, 16, device="meta"))),
}
TAKEN = {  # the last values that are
    "no window": {"window": 0},
    "one side": {"window": [None, 0]},
    "the smallest seed": {"dropout_p": 0.5, "seed": 0},
    "the largest seed": {"dropout_p": 0.5, "seed": 2**63 - 1},
    "much dropout": {"dropout_p": 0.99, "seed": 1},
    "a whole scale": {"sm_scale": 1},
    "no scale": {"sm_scale": 0},
    "a small softcap": {"softcap": 0.5},
    "wide heads": {name: torch.randn(1, 1, 3, 256) for name in ("q", "k", "v")},
    "narrow heads": {name: torch.randn(1, 1, 3, 1) for name in ("q", "k", "v")},
    "wide values": {"v": torch.randn(1, 2, 12, 256)},
    "narrow values": {"v": torch.randn(1, 2, 12, 1)},
}


@pytest.mark.parametrize("name", TAKEN)
def test_values_at_the_bounds_are_taken(name):
    arguments = good(**TAKEN[name])
    output = attention(**arguments)
    assert output.shape == (*arguments["q"].shape[:3], arguments["v"].shape[3])
    assert output.isfinite().all()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    error, message, arguments = BAD[name]
    with pytest.raises(error, match=message):
        attention(**arguments)


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
@pytest.mark.parametrize("n_q", [1, 5], ids=["merged", "in the loop"])
@pytest.mark.parametrize("layout", ["strided", "expanded", "sliced"])
def test_sinks_and_padding_may_have_any_strides(device, backend, n_q, layout):
    q, k, v = make_qkv(Case(2, 4, 2, n_q, 9, 16, False), device=device)
    make = {
        "strided": lambda *shape: torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., ::2],
        "expanded": lambda *shape: torch.randn(*shape[:-1], 1, device=device).expand(shape),
        "sliced": lambda *shape: torch.randn(*shape[:-1], shape[-1] + 3, device=device)[..., 2:-1],
    }[layout]
    sinks, padding = make(4), make(2, 9) > -0.5
    padding = padding if layout == "sliced" else torch.as_strided(padding.clone(), (2, 9), (1, 0))
    results = [
        attention(
            q, k, v, sinks=x, key_padding_mask=real, return_lse=True, return_total_attention=True, backend=backend
        )
        for x, real in ((sinks, padding), (sinks.clone(), padding.contiguous()))
    ]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
