"""The public sums: the oracle's answers on both backends, buffers given or reused, and what is refused."""

import pytest
import torch
from helpers import Case, assert_right, make_qkv, references

from course.largest_tensor import LargestTensor
from flash_attention_with_scores import (
    attention,
    attention_cross_token_qk_sum,
    attention_cross_token_softmax_sum,
    attention_cross_token_softmax_sum_buffered,
    attention_with_col_sum,
    attention_with_col_sum_sequential,
    attention_with_row_sum,
    attention_with_softmax_col_sum,
    release_buffers,
)

CASE = Case(1, 4, 2, 21, 90, 16, True)
SMALL = Case(1, 2, 1, 17, 33, 16, True)
SPLIT = 13
BACKENDS = ["pytorch", "triton"]
OPTIONS = {
    "full": {},
    "causal window": {"causal": True, "window": (40, None)},
    "padding": {"causal": True, "key_padding_mask": torch.arange(90)[None] % 5 > 1, "sm_scale": -0.3},
    "softcap and sinks": {"causal": True, "softcap": 3.0, "sinks": torch.tensor([0.0, 3.0, -torch.inf, 1.0])},
}
SUMS = {  # by the oracle's field
    "row_sum": attention_with_row_sum,
    "col_sum": attention_with_col_sum,
    "softmax_col_sum": attention_with_softmax_col_sum,
    "total_attention": lambda *args, **kwargs: attention(*args, **kwargs, return_total_attention=True),
}
CROSS = {
    "cross_token_qk_sum": attention_cross_token_qk_sum,
    "cross_token_softmax_sum": attention_cross_token_softmax_sum,
    "cross_token_softmax_sum, buffered": attention_cross_token_softmax_sum_buffered,
}
ROOM = {name: name.split("_sum")[0] + "_out" for name in CROSS}  # the argument that takes a buffer for the sums

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_cross = pytest.mark.parametrize("name", CROSS)


@pytest.fixture(autouse=True)
def fresh_workspace():
    yield
    release_buffers()


def every_function(split, sums=SUMS, cross=CROSS):
    """Yield (the oracle's field, the function as one of q, k and v)."""
    yield from sums.items()
    for name, function in cross.items():
        call = lambda q, k, v, *args, f=function, **kwargs: f(q, k, v, split, *args, **kwargs)  # noqa: E731
        yield name.split(",")[0], call


def on(device, options):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@each_backend
@pytest.mark.parametrize("name", OPTIONS)
def test_every_function_matches_the_oracle(device, backend, name):
    q, k, v = make_qkv(CASE, device=device)
    options = on(device, OPTIONS[name])
    oracle, naive = references(q, k, v, **options, split=SPLIT)
    for field, function in every_function(SPLIT):
        output, sums = function(q, k, v, **options, backend=backend)
        assert_right("output", output, oracle, naive, dtype=torch.float32)
        assert_right(field, sums, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize(("backend", "dtype"), [("pytorch", torch.float64), *((b, torch.bfloat16) for b in BACKENDS)])
def test_dtypes(device, backend, dtype):
    q, k, v = make_qkv(CASE, dtype, device)
    oracle, naive = references(q, k, v, True, split=SPLIT)
    wide = torch.promote_types(dtype, torch.float32)
    cross = {name: CROSS[name] for name in ("cross_token_qk_sum", "cross_token_softmax_sum")}
    for field, function in every_function(SPLIT, cross=cross):
        output, sums = function(q, k, v, True, backend=backend)
        assert_right("output", output, oracle, naive, dtype=dtype)
        assert_right(field, sums, oracle, naive, dtype=wide)


def test_scores_kept_in_half_precision_are_rounded(device):
    q, k, v = make_qkv(CASE, torch.float16, device)
    oracle, _ = references(q, k, v, True, split=SPLIT)
    _, sums = attention_cross_token_softmax_sum_buffered(q, k, v, SPLIT, True, backend="triton")
    torch.testing.assert_close(sums.double(), oracle.cross_token_softmax_sum, rtol=2e-3, atol=1e-5)


def test_a_cpu_tensor_runs_pytorch():
    q, k, v = make_qkv(SMALL)
    for _, function in every_function(SPLIT):
        default, explicit = function(q, k, v), function(q, k, v, backend="pytorch")
        assert all(torch.equal(*pair) for pair in zip(default, explicit, strict=True))


@each_backend
def test_total_attention_with_the_lse(device, backend):
    q, k, v = make_qkv(SMALL, device=device)
    options = {"causal": True, "return_lse": True, "return_total_attention": True, "backend": backend}
    output, lse, total = attention(q, k, v, **options)
    oracle, naive = references(q, k, v, True)
    for name, x in (("output", output), ("lse", lse), ("total_attention", total)):
        assert_right(name, x, oracle, naive, dtype=torch.float32)
    torch.testing.assert_close(total.sum(-1), torch.full((1, 2), 17.0, device=device))


@each_backend
def test_part_of_the_queries(device, backend):
    q, k, v = make_qkv(CASE, device=device)
    results = references(q, k, v, True)
    for q_begin, q_stop in ((0, 5), (16, 21), (7, None), (9, 9)):
        oracle, naive = (
            x._replace(softmax_col_sum=x.weights[:, :, q_begin:q_stop].unflatten(1, (2, 2)).sum((2, 3)))
            for x in results
        )
        arguments = {"q_begin": q_begin, "q_stop": q_stop, "backend": backend}
        output, sums = attention_with_softmax_col_sum(q, k, v, True, **arguments)
        assert_right("output", output, oracle, naive)
        assert_right("softmax_col_sum", sums, oracle, naive, dtype=torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_algorithms_agree(device, causal):
    """Linear sums and those of the loop, in any order; sums over two passes that do or do not keep the scores."""
    q, k, v = make_qkv(CASE, device=device)
    attend = {"causal": causal, "window": (50, None), "backend": "triton"}
    _, linear = attention_with_row_sum(q, k, v, **attend)
    _, kahan = attention_with_row_sum(q, k, v, **attend, algorithm="kahan")
    torch.testing.assert_close(linear, kahan, rtol=1e-5, atol=1e-5)
    _, linear = attention_with_col_sum(q, k, v, **attend)
    for algorithm in ("atomic_reverse", "atomic_round_robin"):
        _, atomic = attention_with_col_sum(q, k, v, **attend, algorithm=algorithm)
        torch.testing.assert_close(linear, atomic, rtol=1e-5, atol=1e-5)
    _, sequential = attention_with_col_sum_sequential(q, k, v, **attend)
    torch.testing.assert_close(linear, sequential, rtol=1e-5, atol=1e-5)
    _, linear = attention_cross_token_qk_sum(q, k, v, SPLIT, **attend)
    _, atomic = attention_cross_token_qk_sum(q, k, v, SPLIT, **attend, algorithm="atomic_reverse")
    torch.testing.assert_close(linear, atomic, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("algorithm", ["linear", "kahan", "atomic_reverse", "atomic_round_robin"])
def test_both_backends_take_every_algorithm(device, backend, algorithm):
    q, k, v = make_qkv(SMALL, device=device)
    oracle, naive = references(q, k, v, True)
    name = "row_sum" if algorithm == "kahan" else "col_sum"
    _, sums = SUMS[name](q, k, v, True, algorithm=algorithm, backend=backend)
    assert_right(name, sums, oracle, naive)


@each_backend
def test_dropout_changes_the_output_only_and_the_defaults_give_the_same_bits_twice(device, backend):
    q, k, v = make_qkv(SMALL, device=device)
    plain = attention(q, k, v, True, dropout_p=0.4, seed=3, backend=backend)
    for _, function in every_function(SPLIT):
        output, sums = function(q, k, v, True, backend=backend)
        dropped, same_sums = function(q, k, v, True, dropout_p=0.4, seed=3, backend=backend)
        assert torch.equal(sums, same_sums)
        assert not torch.allclose(output, dropped)
        torch.testing.assert_close(dropped, plain, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("causal", [False, True])
def test_segments_add_up(device, backend, causal):
    """What the keys before the split get from the queries before it, and from those behind, is all that they get."""
    case = Case(1, 2, 1, 40, 40, 16, causal)
    q, k, v = make_qkv(case, device=device)
    attend = {"causal": causal, "backend": backend}
    _, everything = attention_with_softmax_col_sum(q, k, v, **attend)
    _, before = attention_with_softmax_col_sum(q, k, v, **attend, q_stop=SPLIT)
    _, across = attention_cross_token_softmax_sum(q, k, v, SPLIT, **attend)
    torch.testing.assert_close(before[..., :SPLIT] + across, everything[..., :SPLIT], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(everything.sum(-1), torch.full((1, 1), 80.0, device=device))
    if causal:  # queries before the split see no key behind it, and no others than these
        _, alone = attention_with_col_sum(*(x[:, :, :SPLIT] for x in (q, k, v)), **attend)
        _, everything = attention_with_col_sum(q, k, v, **attend)
        _, across = attention_cross_token_qk_sum(q, k, v, SPLIT, **attend)
        torch.testing.assert_close(alone + across, everything[..., :SPLIT], rtol=1e-5, atol=1e-4)


@each_backend
@each_cross
def test_buffers_of_the_caller(device, backend, name):
    q, k, v = make_qkv(SMALL, device=device)
    oracle, naive = references(q, k, v, True, split=SPLIT)
    out, sums_out = torch.empty_like(q), torch.empty(1, 1, SPLIT, device=device)
    for given in ({"out": out}, {ROOM[name]: sums_out}, {"out": out, ROOM[name]: sums_out}):
        out.fill_(torch.nan)
        sums_out.fill_(torch.nan)
        output, sums = CROSS[name](q, k, v, SPLIT, True, **given, backend=backend)
        assert (output is out) == ("out" in given)
        assert (sums is sums_out) == (ROOM[name] in given)
        assert_right("output", output, oracle, naive)
        assert_right(name.split(",")[0], sums, oracle, naive)


@each_backend
@each_cross
def test_reused_buffers(device, backend, name):
    q, k, v = make_qkv(SMALL, device=device)

    def call(q, split=SPLIT, **given):
        return CROSS[name](q, k, v, split, True, reuse_buffers=True, backend=backend, **given)

    first, second = call(torch.zeros_like(q)), call(q)
    assert [x.data_ptr() for x in first] == [x.data_ptr() for x in second]
    oracle, naive = references(q, k, v, True, split=SPLIT)
    assert_right("output", second[0], oracle, naive)
    assert_right(name.split(",")[0], second[1], oracle, naive)
    before = second[1].clone()
    other = call(q, split=SPLIT - 1)
    assert other[1].data_ptr() != second[1].data_ptr()
    assert torch.equal(second[1], before)
    out = torch.empty_like(q)
    output, sums = call(q, out=out)
    assert output is out
    assert sums.data_ptr() == second[1].data_ptr()
    release_buffers()
    assert call(q)[1].data_ptr() != second[1].data_ptr()
    assert torch.equal(second[1], before), "a tensor that was returned must outlive the workspace"


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("k_stop", [None, SPLIT])
def test_only_buffered_sums_keep_the_scores_of_their_region(device, monkeypatch, k_stop, buffered):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from flash_attention_with_scores import triton_backend
    from flash_attention_with_scores.backend import Room
    from flash_attention_with_scores.workspace import buffer
    from stage1_pytorch_tiled.setting import Setting

    shapes = {}

    def noted(name, shape, dtype, device):
        shapes[name] = tuple(shape)
        return buffer(name, shape, dtype, device)

    monkeypatch.setattr(triton_backend, "buffer", noted)
    q, k, v = make_qkv(SMALL, device=device)
    region = {"q_begin": 4, "k_stop": k_stop, "buffered": buffered}
    triton_backend.attention_with_softmax_col_sum(q, k, v, Setting(), **region, room=Room(reuse=True))
    scores = {"kernels' scores": (1, 2, 17 - 4, k_stop or 33)} if buffered else {}
    assert shapes == {"kernels' lse": (1, 2, 17)} | scores


def test_dtypes_do_not_share_their_buffers(device):
    q, k, v = make_qkv(SMALL, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = [x.to(dtype) for x in (q, k, v)]
        output, sums = attention_cross_token_qk_sum(*inputs, SPLIT, reuse_buffers=True, backend="pytorch")
        assert output.dtype == dtype
        assert sums.dtype == torch.promote_types(dtype, torch.float32)


def test_functions_do_not_share_their_buffers(device):
    q, k, v = make_qkv(SMALL, device=device)
    _, raw = attention_cross_token_qk_sum(q, k, v, SPLIT, reuse_buffers=True)
    _, softmax = attention_cross_token_softmax_sum(q, k, v, SPLIT, reuse_buffers=True)
    assert raw.data_ptr() != softmax.data_ptr()


@each_backend
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0), (1, 2, 1, 0), (1, 2, 5, 5)], ids=str)
def test_empty_tensors_and_empty_sums(device, backend, shape):
    batch, heads, n_q, n_k = shape
    q, k = torch.randn(batch, heads, n_q, 16, device=device), torch.randn(batch, heads, n_k, 16, device=device)
    algorithms = {"kahan": attention_with_row_sum, "atomic_reverse": attention_with_col_sum}
    if n_q * n_k * batch == 0:
        for field, function in every_function(split=0, cross={}):
            output, sums = function(q, k, k, backend=backend)
            assert output.shape == q.shape
            assert sums.shape == (batch, heads, n_q if field == "row_sum" else n_k)
            assert not output.any()
            assert not sums.any()
        for algorithm, function in algorithms.items():
            assert not function(q, k, k, algorithm=algorithm, backend=backend)[1].any()
    for name, function in CROSS.items():
        for options in ({}, {"reuse_buffers": True}, {ROOM[name]: torch.empty(batch, heads, 0, device=device)}):
            output, sums = function(q, k, k, 0, backend=backend, **options)
            assert output.shape == q.shape
            assert sums.shape == (batch, heads, 0)
        if n_k and not n_q * batch:
            assert not function(q, k, k, n_k, backend=backend)[1].any()


@each_cross
def test_a_split_past_the_last_query(device, name):
    q, k, v = make_qkv(SMALL, device=device)
    for backend in BACKENDS:
        for options in ({}, {"reuse_buffers": True}):
            output, sums = CROSS[name](q, k, v, 20, backend=backend, **options)
            assert torch.equal(sums, torch.zeros(1, 1, 20, device=device))
            torch.testing.assert_close(output, attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_cpu_backend_never_makes_the_matrix():
    q, k, v = make_qkv(Case(1, 2, 1, 2048, 2048, 16, True))
    for field, function in every_function(split=1000):
        with LargestTensor() as largest:
            function(q, k, v, True, window=700, backend="pytorch")
        tile = 2 * 128 * 512
        assert largest.bytes <= 4 * max(tile, 2 * q.numel()), f"{field}: {largest.bytes} bytes were allocated"


def test_kernels_never_make_the_matrix(device):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    q, k, v = make_qkv(Case(1, 1, 1, 400, 400, 16, True), torch.float16, device)
    for field, function in every_function(split=200, cross={"cross": attention_cross_token_softmax_sum}):
        with LargestTensor() as largest:
            function(q, k, v, True, window=(20, None), backend="triton")
        assert largest.bytes <= 4 * q.numel(), f"{field}: {largest.bytes} bytes were allocated"


OWN_ARGUMENTS = {  # of every operator, behind those of attention
    "attention_with_scores": (),
    "attention_with_row_sum": ("linear",),
    "attention_with_col_sum": ("linear", 3, 4),
    "attention_with_softmax_col_sum": (1, 4, 6, False, False),
    "attention_with_stats": (),
}


@pytest.mark.parametrize("name", OWN_ARGUMENTS)
def test_opcheck(device, name):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward import operators

    q, k, v = make_qkv(Case(1, 4, 2, 5, 9, 16, True), torch.float16, device)  # sums are wider than that
    arguments = (q, k, v, True, 0.25, 0.0, 0, 3, None, None, None, None, None)
    torch.library.opcheck(getattr(operators, name).op, (*arguments, *OWN_ARGUMENTS[name]))


def test_opcheck_of_the_scores_alone(device):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward import operators

    q, k, _ = make_qkv(Case(1, 2, 1, 5, 9, 16, True), device=device)
    torch.library.opcheck(operators.scores_op, (q, k, True, 0.25, 3, None, None))


@pytest.mark.parametrize(
    "function",
    [
        attention_with_row_sum,
        lambda *args, **kwargs: attention_cross_token_softmax_sum(*args, split=SPLIT, **kwargs),
        lambda *args, **kwargs: attention(*args, **kwargs, return_total_attention=True),
    ],
    ids=["row_sum", "cross_token_softmax_sum", "total_attention"],
)
def test_compiles_into_one_graph(device, function):
    q, k, v = make_qkv(SMALL, device=device)

    def block(q, k, v):
        output, sums = function(q * 2, k, v, causal=True, backend="triton")
        return output + 1, sums / 2

    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch.testing.assert_close(compiled(q, k, v), block(q, k, v))


def good(**changes):
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    return {"q": q, "k": k, "v": v} | changes


def cross(**changes):
    return good(split=5) | changes


def overlapping(name):
    """Return arguments whose `out` shares memory with an input."""
    memory = torch.randn(1000)
    arguments = {"q": (1, 4, 8, 16), "k": (1, 4, 8, 16), "v": (1, 4, 8, 16)}
    tensors = {key: torch.randn(shape) for key, shape in arguments.items()}
    tensors[name] = memory[:512].view(1, 4, 8, 16)
    return cross(**tensors, out=memory[400:912].view(1, 4, 8, 16))


@each_cross
def test_buffers_beside_the_inputs(name):
    """Room that ends where an input begins, or begins where one ends, is shared with nobody."""
    memory = torch.randn(3, 1, 4, 8, 16)
    arguments = cross(q=memory[1], k=torch.randn(1, 4, 8, 16), v=torch.randn(1, 4, 8, 16))
    expected = CROSS[name](**{key: x.clone() if key in "qkv" else x for key, x in arguments.items()})
    for out in (memory[0], memory[2]):
        output, sums = CROSS[name](**arguments, out=out)
        assert output is out
        torch.testing.assert_close((output, sums), expected)


def one_number():
    x = torch.randn(1, 1, 1, 1)
    return {"q": x, "k": x.clone(), "v": x.clone(), "split": 1, "out": x}


def sharing_buffers():
    memory = torch.empty(600)
    return cross(out=memory[:512].view(1, 4, 8, 16), SUMS=memory[510:520].view(1, 2, 5))


BAD_CROSS = {
    "negative split": (ValueError, r"split must be in \[0, 12\], the number of keys, got -1", cross(split=-1)),
    "split past the keys": (ValueError, r"split must be in \[0, 12\], the number of keys, got 13", cross(split=13)),
    "split is a float": (TypeError, "split must be an int, got float", cross(split=5.0)),
    "split is a bool": (TypeError, "split must be an int, got bool", cross(split=True)),
    "split is None": (TypeError, "split must be an int, got NoneType", cross(split=None)),
    "split is a tensor": (TypeError, "split must be an int, got Tensor", cross(split=torch.tensor(5))),
    "reuse is an int": (TypeError, "reuse_buffers must be a bool, got int", cross(reuse_buffers=1)),
    "out is a list": (TypeError, "out must be a torch.Tensor or None, got list", cross(out=[1.0])),
    "out of another shape": (
        ValueError,
        r"out must have shape \[1, 4, 8, 16\], got \[1, 4, 8, 15\]",
        cross(out=torch.empty(1, 4, 8, 15)),
    ),
    "out of another dtype": (
        TypeError,
        "out must be torch.float32, got torch.float16",
        cross(out=torch.empty(1, 4, 8, 16).half()),
    ),
    "out elsewhere": (
        ValueError,
        "out must be on q's device cpu, got meta",
        cross(out=torch.empty(1, 4, 8, 16).to("meta")),
    ),
    "out with gaps": (ValueError, "out must be contiguous", cross(out=torch.empty(1, 4, 8, 32)[..., ::2])),
    "out that is q": (ValueError, "out must not share memory with q", overlapping("q")),
    "out that is q, of one number": (ValueError, "out must not share memory with q", one_number()),
    "out over k": (ValueError, "out must not share memory with k", overlapping("k")),
    "out over v": (ValueError, "out must not share memory with v", overlapping("v")),
    "sums is a number": (TypeError, "SUMS must be a torch.Tensor or None, got float", cross(SUMS=1.0)),
    "sums of another shape": (
        ValueError,
        r"SUMS must have shape \[1, 2, 5\], got \[1, 4, 5\]",
        cross(SUMS=torch.empty(1, 4, 5)),
    ),
    "sums for another split": (
        ValueError,
        r"SUMS must have shape \[1, 2, 4\]",
        cross(split=4, SUMS=torch.empty(1, 2, 5)),
    ),
    "sums of another dtype": (
        TypeError,
        "SUMS must be torch.float32, got torch.float64",
        cross(SUMS=torch.empty(1, 2, 5).double()),
    ),
    "sums elsewhere": (ValueError, "SUMS must be on q's device cpu", cross(SUMS=torch.empty(1, 2, 5, device="meta"))),
    "sums with gaps": (
        ValueError,
        "SUMS must be contiguous, got strides",
        cross(SUMS=torch.empty(1, 5, 2).transpose(1, 2)),
    ),
    "both in one place": (ValueError, "SUMS must not share memory with out", sharing_buffers()),
    "negative window": (ValueError, "window must not be negative, got -1", cross(window=-1)),
    "unknown backend": (ValueError, "backend must be one of .* got 'cuda'", cross(backend="cuda")),
    "integers": (
        TypeError,
        "q must be fp16, bf16, fp32 or fp64, got torch.int64",
        cross(q=torch.ones(1, 4, 8, 16).long()),
    ),
}


@each_cross
@pytest.mark.parametrize("bad", BAD_CROSS)
def test_bad_input_of_the_cross_token_sums(name, bad):
    error, message, arguments = BAD_CROSS[bad]
    arguments = {ROOM[name] if key == "SUMS" else key: x for key, x in arguments.items()}
    with pytest.raises(error, match=message.replace("SUMS", ROOM[name])):
        CROSS[name](**arguments)


BAD = {
    "row sum by atomics": (
        attention_with_row_sum,
        ValueError,
        r"algorithm must be one of \('auto', 'linear', 'kahan'\), got 'atomic_reverse'",
        good(algorithm="atomic_reverse"),
    ),
    "column sum by Kahan": (
        attention_with_col_sum,
        ValueError,
        "algorithm must be one of .*'atomic_round_robin'.*, got 'kahan'",
        good(algorithm="kahan"),
    ),
    "no algorithm": (attention_with_col_sum, ValueError, "algorithm must be one of .*, got None", good(algorithm=None)),
    "unknown algorithm": (
        attention_cross_token_qk_sum,
        ValueError,
        "algorithm must be one of .*, got 'fast'",
        cross(algorithm="fast"),
    ),
    "negative q_begin": (attention_with_softmax_col_sum, ValueError, "q_begin .* got -1 and 8", good(q_begin=-1)),
    "q_stop past the queries": (attention_with_softmax_col_sum, ValueError, "<= 8, got 0 and 9", good(q_stop=9)),
    "q_begin past q_stop": (
        attention_with_softmax_col_sum,
        ValueError,
        "0 <= q_begin <= q_stop <= 8, got 5 and 4",
        good(q_begin=5, q_stop=4),
    ),
    "q_begin is a float": (attention_with_softmax_col_sum, TypeError, "must be ints, got 1.0 and 8", good(q_begin=1.0)),
    "q_stop is a bool": (attention_with_softmax_col_sum, TypeError, "must be ints, got 0 and True", good(q_stop=True)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    function, error, message, arguments = BAD[name]
    with pytest.raises(error, match=message):
        function(**arguments)


def test_fp8_has_no_total_attention(device):
    q, k, v = (x.to(torch.float8_e4m3fn) for x in make_qkv(SMALL, device=device))
    with pytest.raises(ValueError, match="return_total_attention takes fp16, bf16, fp32 or fp64, got"):
        attention(q, k, v, return_total_attention=True, backend="triton")


@each_backend
@each_cross
def test_buffers_do_not_go_with_gradients(device, backend, name):
    q, k, v = make_qkv(SMALL, device=device)
    out = torch.empty_like(q)
    for options in ({"out": out}, {"reuse_buffers": True}):
        with pytest.raises(ValueError, match="buffers and reuse_buffers do not go with gradients"):
            CROSS[name](q, k.requires_grad_(), v, SPLIT, **options, backend=backend)
        with torch.no_grad():
            CROSS[name](q, k, v, SPLIT, **options, backend=backend)


@pytest.mark.parametrize("function", [*list(SUMS.values())[:3], attention_with_col_sum_sequential])
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "v must have k's batch, heads and length", good(v=torch.randn(1, 2, 11, 16))),
        (TypeError, "causal must be a bool, got int", good(causal=1)),
        (ValueError, "softcap must be above 0, got -1", good(softcap=-1)),
        (TypeError, "unexpected keyword argument 'widow'", good(widow=3)),
        (TypeError, "q must be fp16, bf16, fp32 or fp64, got", good(q=torch.ones(1, 4, 8, 16).to(torch.float8_e5m2))),
    ],
)
def test_what_all_functions_refuse(function, error, message, arguments):
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.gpu
def test_softmax_sums_of_a_long_sequence():
    """131072 tokens, where a matrix of scores would take 1 TB."""
    n = 131072
    q = torch.randn(1, 32, n, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output, sums = attention_with_softmax_col_sum(q, k, v, True)
    returned = output.numel() * 2 + sums.numel() * 4
    beyond = torch.cuda.max_memory_allocated() - before - returned
    assert beyond <= 100e6, f"{beyond / 1e6:.0f} MB beyond inputs and outputs"
    torch.testing.assert_close(
        sums.double().sum(-1), torch.full((1, 8), 4.0 * n, device="cuda").double(), rtol=1e-4, atol=0
    )


@pytest.mark.gpu
@each_cross
def test_reused_buffers_in_a_cuda_graph(name):
    q, k, v = make_qkv(Case(1, 8, 2, 500, 500, 64, True), torch.bfloat16, "cuda")
    call = lambda: CROSS[name](q, k, v, 300, True, reuse_buffers=True)  # noqa: E731
    outside = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(results, outside, strict=True))
    expected = [x.clone() for x in call()]
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert call()[1].data_ptr() != outside[1].data_ptr(), "another stream, another buffer"
    stream.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["row_sum", "col_sum", "softmax_col_sum", "total_attention"])
def test_runs_in_a_cuda_graph(name):
    q, k, v = make_qkv(Case(1, 8, 2, 500, 500, 64, True), torch.bfloat16, "cuda")
    SUMS[name](q, k, v, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = SUMS[name](q, k, v, True)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(results, SUMS[name](q, k, v, True), strict=True))


@pytest.mark.gpu
def test_memory_is_linear():
    q, k, v = make_qkv(Case(1, 8, 8, 32768, 32768, 64, True), torch.bfloat16, "cuda")
    for field, function in every_function(20000, cross=dict(list(CROSS.items())[:2])):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output, sums = function(q, k, v, True)
        beyond = torch.cuda.max_memory_allocated() - before - output.nbytes - sums.nbytes
        assert beyond <= 2 * q.nbytes, f"{field}: {beyond / 1e6:.0f} MB"  # a matrix would take 17 GB
        del output, sums
