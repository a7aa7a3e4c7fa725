"""The fuzzer: a slice of it finds nothing, it finds what is wrong, and a case that it names can be run again."""

import json
import re
from random import Random

import pytest
import torch
from typer.testing import CliRunner

import flash_attention_with_scores as library
from benchmark import run
from benchmark.fuzz import Run, check_numbers, table
from benchmark.fuzz_case import draw_case, draw_gradients, make_tensors
from benchmark.fuzz_layouts import KINDS, lay_out, memory
from stage1_pytorch_tiled import tiled_forward
from stage4_backward import recompute_pytorch

SLICE = {"pytorch": 80, "triton": 3}


def fuzz(*arguments):
    return CliRunner().invoke(run.app, ["fuzz", *map(str, arguments), "--processes", "1", "--device", "cpu"])


@pytest.mark.parametrize("backend", SLICE)
def test_a_slice_of_it_finds_nothing(backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton has no wheels for this platform")
        if torch.cuda.is_available():
            pytest.skip("the slice is interpreted")
    found = check_numbers(Run(2, backend=backend), tuple(range(SLICE[backend])))
    assert not [line for verdict in found for line in verdict.lines]
    if backend == "pytorch":
        counts = table(found)[-1]
        assert counts["gradients"] > 20
        assert counts["refused"] > 0
        assert {verdict.operator for verdict in found} >= {
            "attention",
            "attention_with_stats",
            "attention_with_reduction",
        }


def without_delta(logits, row_lse, grad_output, v_tile, delta, *rest, right=recompute_pytorch.tile_gradients):
    return right(logits, row_lse, grad_output, v_tile, torch.zeros_like(delta), *rest)


def one_query_more(grid, lse, q_begin=0, q_stop=None, k_stop=None, right=tiled_forward.weight_tiles):
    return right(grid, lse, q_begin, None if q_stop is None else min(q_stop + 1, grid.n_q), k_stop)


def first_sink_for_all(*args, sinks=None, right=library.attention, **options):
    return right(*args, sinks=None if sinks is None else sinks[:1].expand(sinks.shape), **options)


PLANTED = {
    "a dropped delta": (recompute_pytorch, "tile_gradients", without_delta, "attention_with_scores", "gradient of q"),
    "a query too many": (tiled_forward, "weight_tiles", one_query_more, "attention_with_softmax_col_sum", "weight_sum"),
    "a stride of sinks": (library, "attention", first_sink_for_all, "attention", "output"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_finds_what_is_wrong_and_names_the_case(planted, monkeypatch, tmp_path):
    module, name, wrong, operator, field = PLANTED[planted]
    monkeypatch.setattr(module, name, wrong)
    options = ("--backend", "pytorch", "--operator", operator)
    result = fuzz("--seed", 7, "--cases", 30, *options, "--out", tmp_path)
    assert result.exit_code == 1
    assert f"WRONG: {field}" in result.output
    record = json.loads((tmp_path / "fuzz.json").read_text())
    assert record["seed"] == 7
    assert record["rows"][-1]["wrong"] == len(record["disagreements"]) > 0
    command = record["disagreements"][0]["again"]
    assert re.fullmatch(r"python -m benchmark.run fuzz --seed 7 --case \d+ --device cpu --backend pytorch", command)
    assert f"again: {command}" in result.output
    again = fuzz(*command.split("fuzz ")[1].split())
    assert again.exit_code == 1
    assert record["disagreements"][0]["faults"][0] in again.output
    monkeypatch.undo()
    mended = fuzz(*command.split("fuzz ")[1].split())
    assert mended.exit_code == 0, mended.output


def test_options_are_checked():
    assert fuzz("--backend", "cuda").exit_code == 2
    assert fuzz("--case", -1).exit_code == 2


def test_a_case_depends_on_its_seed_and_number_alone():
    for number in range(20):
        cases = [draw_case(3, number) for _ in range(2)]
        assert cases[0] == cases[1]
        first, second = (make_tensors(case) for case in cases)
        assert all(torch.equal(memory(first[name]).cpu(), memory(second[name]).cpu()) for name in first)
    results = {"output": torch.zeros(2, 3, 4)}
    case = draw_case(3, 0)._replace(operator="attention")
    grads = [draw_gradients(case, results)["output"] for _ in range(2)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_keep_shape_and_values(kind):
    for seed in range(20):
        x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
        placed = lay_out(x, Random(seed), kind)
        assert placed.shape == x.shape
        assert not placed.isnan().any()
        if kind not in ("expanded", "all"):
            assert torch.equal(placed, x)
