"""Repeated launches: the same bits as Triton's own, whatever changes from one to the next."""

import random
import threading
from typing import NamedTuple

import pytest
import torch
from helpers import flat

triton = pytest.importorskip("triton", reason="Triton has no wheels for this platform")
tl = triton.language

from stage1_pytorch_tiled.setting import Setting  # noqa: E402
from stage2_triton_forward import describe, launcher, replay, tile_config  # noqa: E402
from stage2_triton_forward.describe import describable, readable  # noqa: E402
from stage2_triton_forward.hook import PLAIN, constant  # noqa: E402
from stage2_triton_forward.launch import config_of, forward  # noqa: E402
from stage2_triton_forward.split_kv import attention_forward  # noqa: E402
from stage2_triton_forward.tile_config import Warps  # noqa: E402
from stage3_scores_and_sums import hooks  # noqa: E402
from stage3_scores_and_sums import launch as stage3  # noqa: E402
from stage4_backward.gradients import Gradients  # noqa: E402
from stage4_backward.launch import backward  # noqa: E402

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def nothing_known():
    launcher.forget_launches()
    replay.forget_tapes()


@pytest.fixture
def by_triton(monkeypatch):
    """Count the launches that Triton dispatches itself."""
    dispatched = []
    dispatch = launcher._launch_by_triton

    def count(kernel, *args):
        dispatched.append(kernel.__name__)
        return dispatch(kernel, *args)

    monkeypatch.setattr(launcher, "_launch_by_triton", count)
    return dispatched


def slowly(call, monkeypatch):
    """Return what a call gives when Triton dispatches every launch."""
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_REPEATS", False)
        return call()


class Family(NamedTuple):
    """Calls that share what a kernel is compiled for, but for sizes, layouts and numbers."""

    name: str
    dtype: torch.dtype
    head_dim: int
    setting: Setting


FAMILIES = [
    Family("attention", torch.float16, 64, Setting()),
    Family("attention", torch.bfloat16, 65, Setting(causal=True, softcap=5.0)),
    Family("attention", torch.float32, 24, Setting(window=(7, None))),
    Family("scores", torch.bfloat16, 128, Setting(causal=True)),
    Family("row_sum", torch.float16, 16, Setting(causal=True)),
    Family("col_sum", torch.float16, 64, Setting(window=16)),
    Family("softmax", torch.float16, 64, Setting(causal=True)),
    Family("stats", torch.bfloat16, 64, Setting()),
    Family("backward", torch.float16, 64, Setting(causal=True)),
    Family("backward", torch.bfloat16, 24, Setting()),
]


SIZES = [  # batch, KV heads, group, M, N: few enough that most calls find their kernels compiled
    (1, 2, 2, 64, 64),
    (2, 1, 1, 65, 128),
    (1, 2, 1, 33, 200),
    (1, 1, 2, 128, 17),
    (1, 2, 2, 1, 64),
    (1, 1, 1, 16, 1),
    (2, 2, 1, 66, 129),
]


def draw_call(rng, family):
    """Draw a call with a strange layout and numbers."""
    batch, n_kv_heads, group, n_q, n_k = rng.choice(SIZES)

    def tensor(heads, n):
        x = torch.randn(batch, heads, n + 3, family.head_dim + 9, device="cuda").to(family.dtype)
        begin = rng.choice([0, 0, 1, 8])
        x = x[:, :, rng.choice([0, 0, 2]) :, begin : begin + family.head_dim][:, :, :n]
        x = x if rng.random() < 0.5 else x.contiguous()
        return x if rng.random() < 0.7 else x.transpose(1, 2).contiguous().transpose(1, 2)

    q, k, v = tensor(n_kv_heads * group, n_q), tensor(n_kv_heads, n_k), tensor(n_kv_heads, n_k)
    if rng.random() < 0.1:
        v = k
    setting = family.setting._replace(sm_scale=rng.choice([None, 0.3, 1.0, 2.0, -0.5]))
    if rng.random() < 0.2 and family.name != "backward":
        setting = setting._replace(sinks=torch.randn(n_kv_heads * group, device="cuda"))
    if rng.random() < 0.2 and family.name != "backward":
        padding = torch.rand(batch, n_k + 1, device="cuda")[:, 1:] > 0.3
        setting = setting._replace(key_padding_mask=padding)
    if rng.random() < 0.2 and family.name == "attention":
        setting = setting._replace(dropout_p=0.25, seed=rng.choice([0, 1, 16, 2**31, 2**40 + 3]))
    if family.name == "attention":
        return lambda: attention_forward(q, k, v, setting)
    if family.name == "row_sum":
        algorithm = rng.choice(["linear", "kahan"])
        return lambda: stage3.attention_with_row_sum(q, k, v, setting, algorithm=algorithm)
    if family.name == "softmax":
        region = {"q_begin": rng.choice([0, n_q // 2]), "k_stop": rng.choice([None, n_k // 2])}
        return lambda: stage3.attention_with_softmax_col_sum(q, k, v, setting, **region)
    if family.name == "backward":
        output, lse = attention_forward(q, k, v, setting)
        grads = Gradients(torch.randn_like(output), torch.randn_like(lse))
        return lambda: backward(q, k, v, output, lse, grads, setting)[:3]
    function = getattr(stage3, f"attention_with_{family.name}")
    return lambda: function(q, k, v, setting)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=lambda i: f"{FAMILIES[i].name}-{i}")
def test_random_calls_give_the_same_bits(monkeypatch, number):
    """Call after call, each beside Triton's own launches: none runs a kernel, or a tape, made for other arguments."""
    rng = random.Random(number)
    torch.manual_seed(number)
    for _ in range(200):
        call = draw_call(rng, FAMILIES[number])
        expected = slowly(call, monkeypatch)
        for _ in range(3):  # by a launch like another, written down, played
            for actual, truth in zip(call(), expected, strict=True):
                assert torch.equal(actual.nan_to_num(7.0), truth.nan_to_num(7.0))


@triton.jit
def fill_kernel(out_ptr, n, step, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    idx = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + idx * step, (idx * TIMES).to(tl.float32), mask=idx < n)


def fill(out, n, step=1, times=1):
    launcher.launch(fill_kernel, (triton.cdiv(n, 64),), Warps(1), out, n, step, TIMES=times, BLOCK=64)
    return out


def test_numbers_that_triton_specialises_are_kinds_of_their_own():
    kinds = [launcher._kind(x) for x in (1, 2, 16, 2**31, 2**31 + 1, 2**63, 0.5, None, True)]
    assert len(set(kinds)) == len(kinds)
    assert launcher._kind(3) == launcher._kind(5)
    assert launcher._kind(32) == launcher._kind(48)


def test_tensors_are_told_apart_by_dtype_and_alignment():
    x = torch.zeros(64)
    assert launcher._kind(x) == launcher._kind(x[4:]) != launcher._kind(x[1:])
    assert launcher._kind(x) != launcher._kind(x.half())


def test_tuples_are_told_apart_by_what_they_hold():
    numbers = describe.describe_logits(0.5, None, "ieee")
    assert launcher.known(numbers).kind == launcher.known(numbers._replace(scale=0.25)).kind
    assert launcher.known(numbers).kind != launcher.known(numbers._replace(FP32_PRECISION=constant("tf32x3"))).kind


@pytest.mark.parametrize("n", [1, 2, 16, 64, 100])
def test_interpreted_or_compiled(device, n):
    out = fill(torch.full((256,), -1.0, device=device), n, step=2, times=3)
    expected = torch.full((256,), -1.0)
    expected[: 2 * n : 2] = 3.0 * torch.arange(n)
    assert torch.equal(out.cpu(), expected)


def test_another_triton_launches_in_its_own_way(monkeypatch, device):
    """Where its version is not known none of its private names is needed."""
    for name in ("_IS_KNOWN", "_REPEATS"):
        monkeypatch.setattr(launcher, name, False)
    monkeypatch.delattr(launcher, "native_specialize_impl")
    describe._loop_of_numbers.cache_clear()
    q = torch.randn(1, 1, 21, 16, device=device)
    try:
        assert forward(q, q, q)[0].shape == q.shape
    finally:
        describe._loop_of_numbers.cache_clear()


@on_gpu
def test_only_the_first_of_a_kind_is_dispatched_by_triton(by_triton):
    out = torch.zeros(256, device="cuda")
    for n in (100, 99, 37):
        fill(out, n)
    assert by_triton == ["fill_kernel"]
    for n in (1, 16, 32, 1):
        fill(out, n)
    assert len(by_triton) == 3, "1 and multiples of 16 have kernels of their own"


@on_gpu
def test_numbers_beyond_32_bits():
    """A step of 2³¹ and more is not launched as one that fits 32 bits was."""
    out = torch.zeros(2**31 + 64, device="cuda")
    for step in (3, 5, 2**31 + 3, 2**31 + 5):
        fill(out, 2, step=step, times=7)
        assert out[step].item() == 7
        out[step] = 0


@on_gpu
def test_another_stream(by_triton):
    out = torch.zeros(64, device="cuda")
    fill(out, 60, times=2)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        fill(out, 60, times=2)
        done = side.record_event()
    assert not done.query(), "the launch did not go to the stream that sleeps"
    torch.cuda.synchronize()
    assert out[59] == 118


@on_gpu
def test_graph_capture():
    q, k, v = torch.randn(3, 1, 2, 64, 64, device="cuda").half().unbind()
    forward(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = forward(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(output, forward(q, k, v)[0])


@on_gpu
def test_a_profiler_sees_every_launch(by_triton):
    from triton import knobs

    seen = []
    out = torch.zeros(64, device="cuda")
    fill(out, 60)
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        fill(out, 60)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    fill(out, 60)
    assert seen == ["fill_kernel"]
    assert by_triton == ["fill_kernel"] * 2


@on_gpu
def test_threads():
    q, k, v = torch.randn(3, 1, 2, 100, 64, device="cuda").half().unbind()
    expected = forward(q, k, v)[0]
    wrong = []

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for n in range(40, 100):
                output = forward(q[:, :, :n], k, v)[0]
                stream.synchronize()
                if not torch.equal(output, expected[:, :, :n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors(by_triton):
    for index in (0, 1, 0, 1):
        device = f"cuda:{index}"
        out = fill(torch.zeros(64, device=device), 60, times=2)
        assert out[59].item() == 118
    assert len(by_triton) == 2


@on_gpu
def test_a_kernel_that_a_test_or_a_learner_replaces(monkeypatch):
    from stage2_triton_forward import launch as stage2

    class StandIn:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: calls.append(grid)

    calls = []
    q = torch.randn(1, 1, 16, 16, device="cuda")
    forward(q, q, q)
    monkeypatch.setattr(stage2, "forward_kernel", StandIn())
    forward(q, q, q)
    assert len(calls) == 1


def test_settings_one_by_one(device):
    """The adapter of these tests says what a Setting says."""
    q = torch.randn(1, 1, 5, 16, device=device)
    expected = attention_forward(q, q, q, Setting(causal=True, sm_scale=0.5, window=(2, None)))
    for actual, truth in zip(flat(attention_forward)(q, q, q, True, 0.5, window=(2, None)), expected, strict=True):
        assert torch.equal(actual, truth)


ARGUMENTS = {  # of config_of, and which row of the table it must take on an H100
    "plain": ({}, "plain"),
    "causal": ({"setting": Setting(causal=True)}, "plain"),
    "right window": ({"setting": Setting(window=(None, 5))}, "plain"),
    "left window": ({"setting": Setting(window=(5, None))}, "guarded"),
    "padding": ({"setting": Setting(key_padding_mask=torch.ones(1, 300, dtype=torch.bool))}, "guarded"),
    "softcap": ({"setting": Setting(softcap=2.0)}, "guarded"),
    "a hook at the logits": ({"hook": hooks.ROW_SUM}, "guarded"),
    "a hook at the weights": ({"hook": hooks.STATS._replace(ON_LOGITS=PLAIN.ON_LOGITS)}, "guarded"),
    "a hook at the start": ({"hook": hooks.QUERY_SUMS}, "plain"),
    "storing": ({"storing": True}, "storing"),
    "dropout": ({"setting": Setting(dropout_p=0.5)}, "dropout"),
}


@pytest.mark.parametrize(("arguments", "row"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_what_a_call_does_chooses_its_tiles(monkeypatch, arguments, row):
    rows = tile_config.Rows(*(tile_config.TileConfig(16, 16, 4, n) for n in range(6)))
    monkeypatch.setattr(tile_config, "architecture", lambda: None)
    monkeypatch.setattr(tile_config, "_table", lambda arch: {64: rows})
    tile_config._forward_config.cache_clear()
    q = torch.empty(1, 2, 100, 64, dtype=torch.float16)
    try:
        assert config_of(q, q, **({"setting": Setting()} | arguments)) == getattr(rows, row)
    finally:
        tile_config._forward_config.cache_clear()


def test_a_result_is_filled_in_place_where_a_descriptor_takes_it():
    whole = torch.empty(2, 3, 5, 12)
    for x in (whole, whole[..., :9], whole[:, :, :1].as_strided((2, 3, 1, 12), (180, 60, 7, 1))):
        assert describable(x) is x
    assert readable(None) is None
    for x in (torch.empty(2, 3, 5, 9), whole.flatten()[1:61].view(1, 1, 5, 12), whole.mT):
        room = describable(x)
        assert room is not x
        assert room.shape == x.shape
        assert describable(room) is room
        assert room.stride(2) == -(-x.shape[3] // 4) * 4  # the next multiple of 16 bytes
