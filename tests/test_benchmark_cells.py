"""Every cell of the benchmark is checked before it is timed, and says what is wrong with it."""

import io

import pytest
import torch
from rich.console import Console

from benchmark import flash, memory, operators
from benchmark.cases import Shape
from benchmark.oracle import StatisticsOracle
from benchmark.record import TimeLimit
from benchmark.tables import show_operators
from course.largest_tensor import LargestTensor
from stage1_pytorch_tiled.dense import naive_attention

HEADS = {"batch": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "causal": True}
CEILING = {"matmul_tflops": 1.0, "copy_gbs": 1.0}
FAST = operators.Timing(warmup_ms=0, rep_ms=0, num_runs=2)
FOREVER = TimeLimit(0)


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 GiB")


def broken(*args):
    raise RuntimeError("kernel fell over\nat line 3")


def operator_rows(make_methods=operators.methods, lengths=(48,), **options):
    args = (lengths, torch.float32, "cpu", FAST, FOREVER, print, CEILING)
    return list(operators.operator_rows(*args, make_methods=make_methods, heads=HEADS, **options))


def test_every_operator_is_right_and_timed():
    rows = operator_rows()
    expected = operators.methods(*Shape(**HEADS, n=8).tensors(torch.float32, device="cpu"), 4)
    assert [row["operator"] for row in rows] == list(expected)
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert set(row) <= {*operators.COLUMNS, "right"}
        assert row["min"] <= row["ms"] <= row["max"]
        assert row["unit"] == ("GB/s" if row["operator"] in ("scores", "scores alone") else "TFLOP/s")
        assert row["speedup"] > 0
    assert len(operator_rows(sum_ops=False)) == 6


def test_rates_are_those_of_the_formulas():
    shape, inputs = Shape(**HEADS, n=48), Shape(**HEADS, n=48).tensors(torch.float32, device="cpu")
    compute = operators._rate(operators.Method(None, products=3), shape, inputs, 2.0, CEILING)
    assert compute["rate"] == pytest.approx(1.5 * 4 * 4 * 48**2 * 16 / 2 / 2e-3 / 1e12)
    store = operators._rate(operators.Method(None, stores=True), shape, inputs, 2.0, CEILING)
    assert store["rate"] == pytest.approx((4 * 48**2 + (4 + 2 + 2) * 48 * 16) * 4 / 2e-3 / 1e9)


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda right: (right[0], right[1] + 0.1), "wrong"),
        (lambda right: (right[0] + 0.1, right[1]), "wrong"),
        (lambda right: (right[0], right[1][..., :-1]), "wrong"),
        (out_of_memory, "out of memory"),
        (broken, "RuntimeError: kernel fell over"),
    ],
    ids=["statistic", "output", "shape", "out of memory", "exception"],
)
def test_a_bad_method_becomes_a_cell_and_is_not_timed(call, status):
    calls = []

    def methods(q, k, v, split, sum_ops):
        found = operators.methods(q, k, v, split)
        good = found["row sum"]

        def bad():
            calls.append(1)
            return call(good.call())

        return {operators.NAIVE: found[operators.NAIVE], "bad": good._replace(call=bad), "row sum": good}

    rows = operator_rows(methods)
    assert [row["status"] for row in rows] == ["ok", status, "ok"]
    assert len(calls) == 1, "it was timed"
    assert "ms" not in rows[1]
    console = Console(file=io.StringIO(), width=120)
    show_operators(rows, console)
    assert status.upper() in console.file.getvalue().upper()


@pytest.mark.parametrize(
    ("n", "split"), [(40, 30), (1500, 1100), (1500, 0)], ids=["one block", "two blocks", "split 0"]
)
def test_the_oracle_adds_blocks_up(n, split):
    q, k, v = Shape(**(HEADS | {"n_heads": 2}), n=n).tensors(torch.float64, device="cpu")
    whole = naive_attention(q, k, v, True, split=split)
    oracle = StatisticsOracle(q, k, v, split)
    for field in (
        "output",
        "scores",
        "lse",
        "row_sum",
        "col_sum",
        "softmax_col_sum",
        "total_attention",
        "mean_distance",
    ):
        assert oracle.agrees(field, getattr(whole, field)), field
        assert not oracle.agrees(field, getattr(whole, field) * 1.001), field
    for field in ("cross_token_qk_sum", "cross_token_softmax_sum"):
        assert oracle.agrees(field, getattr(whole, field)), field


SWEEP = flash.CPU_SWEEP._replace(lengths=(16, 32), head_dims=(16,), warmup_ms=0, rep_ms=0)


def flash_rows(finished=(), sweep=SWEEP, **extra):
    methods = flash.methods("cpu") | {name: lambda q, k, v, call=call: call for name, call in extra.items()}
    return list(flash.flash_rows(sweep, "cpu", list(finished), FOREVER, print, lambda device: methods))


def test_flash_times_three_passes_and_compares_with_plain_pytorch():
    rows = flash_rows()
    assert len(rows) == 2 * len(flash.methods("cpu"))
    for row in rows:
        assert row["status"] == "ok"
        assert set(row) == set(flash.COLUMNS)
        if row["method"] == flash.PLAIN:
            assert row["forward_speedup"] == 1


def test_flash_skips_finished_cells():
    rows = flash_rows()
    assert flash_rows(rows) == []
    assert [flash.key_of(row) for row in flash_rows(rows[:4])] == [flash.key_of(row) for row in rows[4:]]


def test_flash_says_why_a_cell_is_empty():
    def wrong_gradient(q, k, v):
        return flash.FlashAttentionPyTorchFunc.apply(q, k.detach() + 0 * k, v, True)

    rows = flash_rows(sweep=SWEEP._replace(lengths=(16, 32, 64)), oom=out_of_memory, wrong=wrong_gradient)
    of = {name: [row["status"] for row in rows if row["method"] == name] for name in ("oom", "wrong", "SDPA")}
    assert of["oom"] == ["out of memory", *["skipped: at shorter lengths out of memory"] * 2]
    assert of["wrong"] == ["wrong", "wrong", "skipped: at shorter lengths wrong"]
    assert of["SDPA"] == ["ok"] * 3


@pytest.mark.parametrize(
    ("tried", "n", "expected"),
    [
        ([], 64, ""),
        ([(32, 200.0)], 64, "skipped: would take 0.8 s"),
        ([(16, 100.0), (32, 50.0)], 64, ""),
        ([(16, 40.0)], 128, "skipped: would take 2.6 s"),
        ([(16, 0.2)], 65536, ""),  # that was Python's own time
    ],
    ids=["first", "slow", "fast", "gap", "overhead"],
)
def test_flash_skips_what_would_take_too_long(tried, n, expected):
    rows = [{"n": length, "status": "ok", "end_to_end_ms": ms} for length, ms in tried]
    assert flash._hopeless(rows, n, 0.5) == expected


def memory_rows(lengths=(128, 256), **extra):
    def find(q, k, v):
        return memory.attentions(q, k, v) | extra

    return list(memory.memory_rows(lengths, torch.float32, "cpu", FOREVER, print, find, HEADS))


def test_memory_of_the_naive_formula_grows_with_the_square():
    rows = memory_rows((256, 512, 1024))
    of = {(row["operator"], row["pass"], row["n"]): row["beyond_mb"] for row in rows}
    for direction in ("forward", "backward"):
        assert of[memory.NAIVE, direction, 1024] > 3.8 * of[memory.NAIVE, direction, 512]
        assert of["attention", direction, 1024] < 2.2 * of["attention", direction, 512]
    assert {row["operator"] for row in rows if row["n"] == 1024} >= {"row sum", "softmax column sum", "stats"}
    assert all(row["sum_error"] < 1e-5 for row in rows if "sum_error" in row)


def test_memory_goes_on_without_a_method_that_ran_out():
    rows = memory_rows((64, 128), huge=out_of_memory)
    status = [row["status"] for row in rows if row["operator"] == "huge" and row["pass"] == "forward"]
    assert status == ["out of memory", "out of memory at a shorter length"]


@pytest.mark.parametrize(
    ("call", "beyond"),
    [
        (lambda x: (x + 1,), 0),
        (lambda x: ((x + 1).mul(2) + 3,), 1),
        (lambda x: (x.view(-1)[:8],), 0),
        (lambda x: (torch.zeros(1000) + 1, (x * 2).sum())[1:], 2),
    ],
    ids=["result only", "one temporary at a time", "view", "two temporaries"],
)
def test_peak_counts_what_is_alive_at_a_time(call, beyond):
    from benchmark.peak import bytes_beyond

    x = torch.randn(1000)
    assert bytes_beyond(lambda: call(x), "cpu") // 4000 == beyond
    with LargestTensor() as largest:
        call(x)
    assert largest.bytes <= 4000
