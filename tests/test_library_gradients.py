"""Gradients through everything that the library returns, on both backends, and under PyTorch's own machinery."""

import pytest
import torch
from gradient_helpers import make_problem
from helpers import Case, make_qkv
from torch.utils.checkpoint import checkpoint

import flash_attention_with_scores as library
from course.grader import compare
from flash_attention_with_scores import attention, attention_with_row_sum, attention_with_scores, naive_attention
from stage1_pytorch_tiled.setting import Setting
from stage4_backward.gradients import Gradients

CACHE = Case(1, 4, 2, 21, 90, 16, True)
EMPTY_ROWS = Case(1, 2, 1, 70, 33, 16, True)
SMALL = Case(1, 2, 1, 9, 13, 16, True)
SPLIT = 12
BACKENDS = ["pytorch", "triton"]
FUNCTIONS = {  # (q, k, v, **options) -> the result, by the oracle's field
    "output": attention,
    "lse": lambda *qkv, **options: attention(*qkv, return_lse=True, **options)[1],
    "total_attention": lambda *qkv, **options: attention(*qkv, return_total_attention=True, **options)[1],
    "scores": lambda *qkv, **options: attention_with_scores(*qkv, **options)[1],
    "row_sum": lambda *qkv, **options: attention_with_row_sum(*qkv, **options)[1],
    "col_sum": lambda *qkv, **options: library.attention_with_col_sum(*qkv, **options)[1],
    "softmax_col_sum": lambda *qkv, **options: library.attention_with_softmax_col_sum(*qkv, **options)[1],
    "cross_token_qk_sum": lambda *qkv, **options: library.attention_cross_token_qk_sum(*qkv, SPLIT, **options)[1],
    "cross_token_softmax_sum": lambda *qkv, **options: library.attention_cross_token_softmax_sum(
        *qkv, SPLIT, **options
    )[1],
    "entropy": lambda *qkv, **options: library.attention_with_stats(*qkv, **options).entropy,
}
ALGORITHMS = [
    (attention_with_row_sum, "row_sum", "kahan"),
    (library.attention_with_col_sum, "col_sum", "atomic_reverse"),
    (library.attention_with_col_sum, "col_sum", "atomic_round_robin"),
]
OPTIONS = {
    "plain": {},
    "window": {"causal": True, "window": (75, None), "sm_scale": -0.3},
    "padding": {"causal": True, "key_padding_mask": True},
    "softcap and sinks": {"causal": True, "softcap": 3.0, "sinks": True},
}
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(case, device="cpu", dtype=torch.float32, options=()):
    """Return the inputs that want gradients, and the options with their tensors drawn."""
    inputs = dict(zip("qkv", make_qkv(case, dtype, device), strict=True))
    options = dict(options)
    if options.pop("sinks", False):
        inputs["sinks"] = torch.randn(case.n_heads, device=device, dtype=dtype)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = torch.rand(case.batch, case.n_k, device=device) > 0.3
    return {name: x.requires_grad_() for name, x in inputs.items()}, options


def gradients(results, inputs, grads):
    """Return the gradients of all inputs by name, 0 for an input that nothing depends on."""
    found = torch.autograd.grad(results, [*inputs.values()], grads, allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(inputs.items(), found, strict=True)}


def call(function, inputs, **options):
    inputs = dict(inputs)
    qkv = [inputs.pop(name) for name in "qkv"]
    return function(*qkv, **inputs, **options)


def naive_results(names, inputs, **options):
    result = call(naive_attention, inputs, split=SPLIT, **options)
    return [getattr(result, name) for name in names]


def check(actual, names, inputs, grads, eps_factor=16.0, **options):
    """Compare gradients with those of the named fields of the oracle, by the course's tolerance."""
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    oracle = gradients(naive_results(names, wide, **options), wide, [g.double() for g in grads])
    naive = gradients(naive_results(names, inputs, **options), inputs, grads)
    for name, expected in oracle.items():
        assert actual[name].dtype == inputs[name].dtype
        error, allowed, ok = compare(actual[name], expected, naive[name], eps_factor)
        ok = ok or error < 1e-6  # what is exactly 0 may be computed as the difference of two sums
        assert ok, f"gradient of {name} from {names}: error {error:.3g}, allowed {allowed:.3g}"


@each_backend
@pytest.mark.parametrize("case", [CACHE._replace(n_heads=2, n_kv_heads=1), EMPTY_ROWS], ids=["M < N", "M > N"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_result_is_differentiable(device, backend, case, options, name):
    inputs, options = draw(case, device, options=options)
    result = call(FUNCTIONS[name], inputs, backend=backend, **options)
    grad = torch.randn_like(result)
    check(gradients(result, inputs, grad), [name], inputs, [grad], **options)


@each_backend
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (20, 3), "key_padding_mask": True}], ids=str)
def test_scores_alone(device, backend, options):
    inputs, options = draw(CACHE, device, options=options)
    q, k = inputs["q"], inputs["k"]
    scores = library.compute_attention_scores(q, k, backend=backend, **options)
    grad = torch.randn_like(scores)
    check(gradients(scores, inputs, grad), ["scores"], inputs, [grad], **options)


@each_backend
@pytest.mark.parametrize(("function", "name", "algorithm"), ALGORITHMS)
def test_algorithms_share_their_gradient(device, backend, function, name, algorithm):
    inputs, _ = draw(SMALL, device)
    result = call(function, inputs, causal=True, algorithm=algorithm, backend=backend)[1]
    grad = torch.randn_like(result)
    check(gradients(result, inputs, grad), [name], inputs, [grad], causal=True)


@each_backend
def test_buffered_and_sequential_sums(device, backend):
    inputs, _ = draw(SMALL, device)
    buffered = library.attention_cross_token_softmax_sum_buffered
    result = call(buffered, inputs, split=SPLIT, causal=True, backend=backend)[1]
    grad = torch.randn_like(result)
    check(gradients(result, inputs, grad), ["cross_token_softmax_sum"], inputs, [grad], causal=True)
    result = call(library.attention_with_col_sum_sequential, inputs, causal=True, backend=backend)[1]
    grad = torch.randn_like(result)
    check(gradients(result, inputs, grad), ["col_sum"], inputs, [grad], causal=True)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["scores", "row_sum", "softmax_col_sum"])
def test_output_and_statistic_in_half_precision(device, backend, dtype, name):
    inputs, _ = draw(CACHE, device, dtype)
    function = getattr(library, f"attention_with_{name}")
    results = call(function, inputs, causal=True, backend=backend)
    grads = [torch.randn_like(x) for x in results]
    check(gradients(results, inputs, grads), ["output", name], inputs, grads, causal=True)


@each_backend
def test_output_lse_and_total_in_one_loss(device, backend):
    inputs, options = draw(CACHE, device, options=OPTIONS["softcap and sinks"])
    results = call(attention, inputs, return_lse=True, return_total_attention=True, backend=backend, **options)
    grads = [torch.randn_like(x) for x in results]
    check(gradients(results, inputs, grads), ["output", "lse", "total_attention"], inputs, grads, **options)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS["padding"], OPTIONS["softcap and sinks"]], ids=["padding", "sinks"])
def test_output_lse_and_entropy_in_one_loss(device, backend, dtype, options):
    inputs, options = draw(CACHE, device, dtype, options=options)
    results = call(library.attention_with_stats, inputs, backend=backend, **options)[:3]
    grads = [torch.randn_like(x) for x in results]
    check(gradients(results, inputs, grads), ["output", "lse", "entropy"], inputs, grads, **options)


@each_backend
def test_entropy_of_rows_that_see_nothing_and_of_one_key(device, backend):
    """Both are 0 whatever the logits are, and make no NaN of what is 0 times infinity."""
    inputs, _ = draw(EMPTY_ROWS, device)
    entropy = call(library.attention_with_stats, inputs, causal=True, backend=backend).entropy
    assert not entropy[:, :, :38].any()
    grads = gradients(entropy[:, :, :37].sum(), inputs, None)
    assert not any(grad.any() for grad in grads.values())
    grads = gradients(
        call(library.attention_with_stats, inputs, causal=True, backend=backend).entropy.sum(), inputs, None
    )
    assert not grads["q"][:, :, :37].any()
    assert grads["q"][:, :, 37].abs().max() < 1e-6
    assert grads["q"][:, :, 38:].any(-1).all()
    assert not grads["v"].any()


@each_backend
def test_weights_alike_have_the_largest_entropy(device, backend):
    """There the gradient is 0; from elsewhere, a step along it makes every row's entropy larger."""
    inputs, _ = draw(CACHE, device)
    alike = {name: (x * 0 if name == "q" else x).detach().requires_grad_() for name, x in inputs.items()}
    entropy = call(library.attention_with_stats, alike, backend=backend).entropy
    assert gradients(entropy.sum(), alike, None)["q"].abs().max() < 1e-5
    entropy = call(library.attention_with_stats, inputs, backend=backend).entropy
    grad = gradients(entropy.sum(), inputs, None)["q"]
    nearer = library.attention_with_stats(inputs["q"] + 1e-2 * grad, inputs["k"], inputs["v"], backend=backend).entropy
    assert (nearer > entropy).all()


@each_backend
def test_results_of_several_functions_in_one_loss(device, backend):
    """A distillation loss with sparsity terms; the output of one call is used twice, and by another call."""

    def loss(inputs, attend, with_scores, with_row_sum, **options):
        output, scores = call(with_scores, inputs, causal=True, **options)
        again, row_sum = call(with_row_sum, inputs | {"q": output}, causal=True, **options)
        plain = call(attend, inputs, causal=True, **options)
        return (
            (output * again).sum() + output.square().mean() + scores.abs().mean() + row_sum.tanh().sum() + plain.sum()
        )

    def dense(*fields):
        def run(*qkv, **options):
            result = naive_attention(*qkv, **options)
            found = [getattr(result, field) for field in fields]
            return found if len(found) > 1 else found[0]

        return run

    inputs, _ = draw(CACHE, device)
    total = loss(inputs, attention, attention_with_scores, attention_with_row_sum, backend=backend)
    actual = gradients(total, inputs, None)
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = loss(wide, dense("output"), dense("output", "scores"), dense("output", "row_sum"))
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
    for name, grad in gradients(expected, wide, None).items():
        torch.testing.assert_close(actual[name].double(), grad, rtol=1e-3, atol=1e-4)


@each_backend
def test_an_output_used_twice(device, backend):
    inputs, _ = draw(CACHE, device)
    output, scores = call(attention_with_scores, inputs, causal=True, backend=backend)
    grads = [torch.randn_like(output), torch.randn_like(scores)]
    loss = (output * grads[0]).sum() + (output * 2 * grads[0]).sum() + (scores * grads[1]).sum() - scores.sum()
    check(gradients(loss, inputs, None), ["output", "scores"], inputs, [3 * grads[0], grads[1] - 1], causal=True)


@each_backend
def test_backward_twice(device, backend):
    inputs, _ = draw(SMALL, device)
    output = call(attention, inputs, causal=True, backend=backend)
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, [*inputs.values()], grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(output, [*inputs.values()], grad)))


@each_backend
@pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks", "kv"])
def test_gradients_of_some_inputs_only(device, backend, wanted):
    inputs, _ = draw(SMALL, device, options={"sinks": True})
    output = call(attention, inputs, causal=True, backend=backend)
    grad = torch.randn_like(output)
    everything = gradients(output, inputs, grad)
    some = {name: x.detach().requires_grad_(name in wanted or name == wanted) for name, x in inputs.items()}
    call(attention, some, causal=True, backend=backend).backward(grad)
    for name, x in some.items():
        assert (x.grad is None) == (not x.requires_grad)
        assert x.grad is None or torch.equal(x.grad, everything[name])


@each_backend
def test_no_graph_where_none_is_wanted(device, backend):
    inputs, _ = draw(SMALL, device)
    with torch.no_grad():
        assert not call(attention, inputs, backend=backend).requires_grad
    assert not attention(*(x.detach() for x in inputs.values()), backend=backend).requires_grad


@each_backend
@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_tensors(device, backend, shape, name):
    inputs, options = draw(Case(*shape, 16, False), device, options={"sinks": True})
    if name.startswith("cross_token"):
        options["split"] = 0
        function = getattr(library, f"attention_{name}")
        result = call(function, inputs, backend=backend, **options)[1]
    else:
        result = call(FUNCTIONS[name], inputs, backend=backend, **options)
    for grad in gradients(result, inputs, torch.randn_like(result)).values():
        assert (grad == 0).all()


@each_backend
def test_dropout_is_drawn_again(device, backend):
    """Output is linear in v, and the gradient of v that linear map's transpose: with the same weights dropped."""
    inputs, _ = draw(SMALL, device)
    dropped = {"causal": True, "dropout_p": 0.4, "seed": 7, "backend": backend}
    output = call(attention, inputs, **dropped)
    grad = torch.randn_like(output)
    grads = gradients(output, inputs, grad)
    direction = torch.randn_like(inputs["v"])
    along = attention(inputs["q"], inputs["k"], direction, **dropped)
    torch.testing.assert_close((along * grad).sum(), (direction * grads["v"]).sum(), rtol=1e-4, atol=1e-4)
    torch.manual_seed(3)
    unseeded = call(attention, inputs, causal=True, dropout_p=0.4, backend=backend)
    first = gradients(unseeded, inputs, grad)["q"]
    torch.manual_seed(3)
    again = gradients(call(attention, inputs, causal=True, dropout_p=0.4, backend=backend), inputs, grad)["q"]
    assert torch.equal(first, again)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name, options):
    inputs, options = draw(Case(1, 2, 1, 5, 13, 3, True), dtype=torch.float64, options=options)

    def function(*tensors):
        return call(FUNCTIONS[name], dict(zip(inputs, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@each_backend
@pytest.mark.parametrize("name", ["output", "scores", "row_sum", "softmax_col_sum", "entropy"])
def test_compiles_into_one_graph(device, backend, name):
    """Forward and backward; the kernels are opaque to the compiler, so that tracing them is what there is to test."""
    inputs, _ = draw(SMALL, device)

    def loss(q, k, v):
        return (FUNCTIONS[name](q * 2, k, v, causal=True, backend=backend) + 1).square().sum()

    torch._dynamo.reset()  # each name compiles the same function anew, and PyTorch counts how often
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    actual, expected = compiled(*inputs.values()), loss(*inputs.values())
    torch.testing.assert_close(actual, expected)
    expected = gradients(expected, inputs, None)
    for name, grad in gradients(actual, inputs, None).items():
        torch.testing.assert_close(grad, expected[name])


@each_backend
@pytest.mark.parametrize("name", ["output", "softmax_col_sum"])
def test_activation_checkpointing(device, backend, name):
    inputs, _ = draw(SMALL, device)

    def block(q, k, v):
        return FUNCTIONS[name](q.tanh(), k, v, causal=True, dropout_p=0.3, seed=5, backend=backend)

    expected = block(*inputs.values())
    grad = torch.randn_like(expected)
    expected = gradients(expected, inputs, grad)
    checkpointed = gradients(checkpoint(block, *inputs.values(), use_reentrant=False), inputs, grad)
    for name in inputs:
        assert torch.equal(checkpointed[name], expected[name])


@each_backend
def test_checkpointing_draws_the_same_seed(device, backend):
    """Without a seed torch's generator gives one, which checkpointing rewinds before it runs the block again."""
    inputs, _ = draw(SMALL, device)

    def block(q, k, v):
        return attention(q, k, v, dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    output = block(*inputs.values())
    grad = torch.randn_like(output)
    expected = gradients(output, inputs, grad)
    torch.manual_seed(1)
    actual = gradients(checkpoint(block, *inputs.values(), use_reentrant=False), inputs, grad)
    for name in inputs:
        assert torch.equal(actual[name], expected[name])


@each_backend
def test_autocast(device, backend):
    """Projections in bf16, attention in what they gave it, gradients in the parameters' fp32."""
    x = torch.randn(2, 20, 32, device=device)
    projections = torch.nn.Linear(32, 3 * 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        q, k, v = projections(x).view(2, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
        output, scores = attention_with_scores(q, k, v, causal=True, backend=backend)
    assert output.dtype == scores.dtype == torch.bfloat16
    weight, bias = (p.detach().double().requires_grad_() for p in projections.parameters())
    q, k, v = torch.nn.functional.linear(x.double(), weight, bias).view(2, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
    oracle = naive_attention(q, k, v, causal=True)
    (output.float().square().sum() + scores.float().sum()).backward()
    (oracle.output.square().sum() + oracle.scores.sum()).backward()
    assert projections.weight.grad.dtype == torch.float32
    largest = weight.grad.abs().max()
    assert (projections.weight.grad.double() - weight.grad).abs().max() < 0.03 * largest


@each_backend
def test_autocast_casts_what_is_not_cast_yet(device, backend):
    q, k, v = (x.requires_grad_() for x in make_qkv(SMALL, device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        output, scores = attention_with_scores(q, k, v.bfloat16(), causal=True, backend=backend)
    assert output.dtype == scores.dtype == torch.bfloat16
    output.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_leaves_fp64_alone():
    q, k, v = (x.requires_grad_() for x in make_qkv(SMALL, torch.float64))
    expected = attention_with_scores(q, k, v, causal=True, backend="pytorch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, scores = attention_with_scores(q, k, v, causal=True, backend="pytorch")
    assert output.dtype == scores.dtype == torch.float64
    assert torch.equal(output, expected[0])
    assert torch.equal(scores, expected[1])


@each_backend
def test_sums_over_a_part_of_the_queries(device, backend):
    """Queries outside of it get nothing from the sums."""
    inputs, _ = draw(SMALL, device)
    for q_begin, q_stop in ((2, 5), (4, None)):
        part = {"q_begin": q_begin, "q_stop": q_stop}
        _, sums = library.attention_with_softmax_col_sum(*inputs.values(), True, **part, backend=backend)
        grad = torch.randn_like(sums)
        actual = gradients(sums, inputs, grad)
        wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
        weights = naive_attention(*wide.values(), True).weights[:, :, q_begin:q_stop]
        expected = gradients(weights.sum((1, 2))[:, None], wide, grad.double())
        assert not actual["q"][:, :, :q_begin].any()
        assert q_stop is None or not actual["q"][:, :, q_stop:].any()
        for name in inputs:
            torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-4, atol=1e-5)


def forward_arguments(device, sinks=False):
    q, k, v = (x.requires_grad_() for x in make_qkv(SMALL, device=device))
    sinks = torch.randn(2, device=device, requires_grad=True) if sinks else None
    return q, k, v, True, 0.25, 0.0, 0, 6, None, None, sinks, None, None


def test_opcheck_of_attention(device):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward.operators import attention

    torch.library.opcheck(attention.op, forward_arguments(device))
    torch.library.opcheck(attention.op, forward_arguments(device, sinks=True))


@pytest.mark.parametrize("name", ["scores", "row_sum", "col_sum", "softmax_col_sum", "stats"])
def test_opcheck_of_statistics(device, name):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward import operators

    operator = getattr(operators, f"attention_with_{name}")
    arguments = (*forward_arguments(device), *operator.defaults.values())
    if name == "stats":  # two have no gradient
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(operator.op, arguments)


def test_an_operator_gives_its_output_and_sinks_their_gradients(device):
    """What a compiled model runs; other results of the operator have no gradients, and nobody asks for them."""
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward.operators import attention_with_stats

    arguments = forward_arguments(device, sinks=True)
    inputs = dict(zip(("q", "k", "v", "sinks"), (*arguments[:3], arguments[-3]), strict=True))
    output, *_ = attention_with_stats.op(*arguments)
    grad = torch.randn_like(output)
    expected = naive_attention(*arguments[:3], True, 0.25, window=(6, None), sinks=arguments[-3]).output
    for actual, truth in zip(
        gradients([output], inputs, [grad]).values(), gradients([expected], inputs, [grad]).values(), strict=True
    ):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-5)


def test_opcheck_of_scores_alone(device):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward.operators import scores_op

    q, k, *_ = forward_arguments(device)
    torch.library.opcheck(scores_op, (q, k, True, None, 6, None, None))


def test_opcheck_of_the_backward_pass(device):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward.operators import backward_op

    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in forward_arguments(device, sinks=True)]
    output, lse = attention(*arguments[:3], True, return_lse=True, window=(6, None), sinks=arguments[-3])
    row, col = torch.randn_like(lse), torch.randn(1, 1, 13, device=device)
    scores = torch.randn(1, 2, 9, 13, device=device)
    everything = (torch.randn_like(output), torch.randn_like(lse), scores, row, col, torch.randn_like(col), row)
    for grads in (everything, (None, None, None, row, col, None, None), (everything[0], *[None] * 6)):
        torch.library.opcheck(backward_op, (*arguments, output, lse, *grads, 0, None))


@each_backend
@pytest.mark.parametrize("given", [{"reuse_buffers": True}, {"out": torch.empty(1, 2, 9, 16)}], ids=["reused", "given"])
@pytest.mark.parametrize("name", ["qk", "softmax"])
def test_buffers_do_not_go_with_gradients(device, backend, given, name):
    inputs, _ = draw(SMALL, device)
    function = getattr(library, f"attention_cross_token_{name}_sum")
    given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    with pytest.raises(ValueError, match="buffers and reuse_buffers do not go with gradients: call under"):
        call(function, inputs, split=SPLIT, backend=backend, **given)
    with torch.no_grad():
        output, _ = call(function, inputs, split=SPLIT, backend=backend, **given)
    assert not output.requires_grad
    library.release_buffers()


@pytest.mark.parametrize("descales", [None, (0.5, 2.0, 3.0)])
def test_fp8_has_no_backward_pass(device, descales):
    q, k, v = (x.to(torch.float8_e4m3fn).requires_grad_() for x in make_qkv(SMALL, device=device))
    output = attention(q, k, v, descales=descales, backend="triton")
    with pytest.raises(NotImplementedError, match="attention on fp8 inputs has no backward pass"):
        output.float().sum().backward()


@each_backend
def test_two_of_the_stats_have_no_gradient_and_their_output_has(device, backend):
    inputs, _ = draw(SMALL, device)
    stats = call(library.attention_with_stats, inputs, causal=True, backend=backend)
    for x in (stats.max_weight, stats.mean_distance):
        with pytest.raises(NotImplementedError, match="stats: max_weight and mean_distance have no gradient"):
            x.sum().backward(retain_graph=True)
    grads = [torch.randn_like(stats.output), torch.randn_like(stats.lse)]
    check(gradients([stats.output, stats.lse], inputs, grads), ["output", "lse"], inputs, grads, causal=True)


@each_backend
@pytest.mark.parametrize("layout", ["expanded", "strided", "transposed"])
@pytest.mark.parametrize("name", ["lse", "scores", "row_sum", "col_sum", "softmax_col_sum", "entropy"])
def test_incoming_gradients_may_have_any_strides(device, backend, name, layout):
    several_heads = Case(2, 4, 2, 9, 13, 16, True)  # so that a transposed [B, H, N] is not contiguous
    inputs, options = draw(several_heads, device, options={"causal": True, "backend": backend})
    result = FUNCTIONS[name](*inputs.values(), **options)
    grad = {
        "expanded": lambda: torch.randn(result.shape[-1], device=device).expand(result.shape),
        "strided": lambda: torch.randn(*result.shape[:-1], 2 * result.shape[-1], device=device)[..., ::2],
        "transposed": lambda: torch.randn(*reversed(result.shape), device=device).permute(
            *reversed(range(result.ndim))
        ),
    }[layout]()
    expected = gradients(
        [FUNCTIONS[name](*inputs.values(), **options)], inputs, [grad.clone(memory_format=torch.contiguous_format)]
    )
    for key, actual in gradients([result], inputs, [grad]).items():
        assert torch.equal(actual, expected[key]), f"gradient of {key} depends on the layout of what comes in"


@pytest.mark.parametrize("name", ["q", "k"])
def test_scores_of_keys_that_nobody_sees_have_gradients_of_zero(name):
    inputs, _ = draw(SMALL)
    inputs = {key: x.detach().requires_grad_(key == name) for key, x in inputs.items()}
    padding = torch.zeros(1, 13, dtype=torch.bool)
    for options in ({"window": (None, 0), "key_padding_mask": padding}, {"causal": True, "window": (0, 0)}):
        keys = inputs["k"][:, :, :0] if "causal" in options else inputs["k"]
        scores = library.compute_attention_scores(inputs["q"], keys, backend="pytorch", **options)
        (grad,) = torch.autograd.grad([scores], [inputs[name]], [torch.ones_like(scores)])
        assert not grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["output", "softmax_col_sum", "row_sum", "col_sum", "entropy"])
def test_memory_is_linear(name):
    """Gradients, an lse and a delta, and for raw sums fp32 copies; one head's scores alone would be 2 GiB."""
    inputs, _ = draw(Case(1, 8, 2, 32768, 32768, 64, True), "cuda", torch.bfloat16)
    result = call(FUNCTIONS[name], inputs, causal=True)
    grad = torch.randn_like(result)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(result, [*inputs.values()], grad, allow_unused=True)
    beyond = torch.cuda.max_memory_allocated() - before
    q_bytes = inputs["q"].numel() * inputs["q"].element_size()
    assert beyond < 12 * q_bytes < 32768**2, f"{beyond / q_bytes:.1f} times q"


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    inputs, _ = draw(Case(1, 4, 2, 512, 512, 64, True), "cuda", torch.bfloat16)
    grad = torch.randn_like(inputs["q"])

    def step():
        return torch.autograd.grad(call(attention, inputs, causal=True), [*inputs.values()], grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs["q"].normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, step()))


def test_column_sums_are_of_all_queries_where_nothing_else_is_said(device):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    from stage4_backward import launch

    q, k, v, output, lse = make_problem(Case(2, 2, 1, 21, 150, 16, True), device=device, causal=True).inputs
    grad = torch.randn(2, 1, 150, device=device)
    grad_q, grad_k, *_ = launch.backward(q, k, v, output, lse, Gradients(col_sum=grad), Setting(causal=True))
    q, k = q.requires_grad_(), k.requires_grad_()
    col_sum = naive_attention(q, k, v, True).col_sum
    for actual, expected in zip((grad_q, grad_k), torch.autograd.grad(col_sum, (q, k), grad), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
