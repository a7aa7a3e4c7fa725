"""The options of `python -m benchmark.run`, without a GPU."""

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from benchmark import flash, operators, run

DEFAULTS = operators.Timing(50, 200, 3, False, 3, 5)


def invoke(*arguments):
    return CliRunner().invoke(run.app, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["operators", "--seq-lens", "1024,x"], "--seq-lens"),
        (["operators", "--seq-lens", "0"], "--seq-lens"),
        (["operators", "--dtype", "int8"], "--dtype"),
        (["operators", "--device", "tpu"], "--device"),
        (["operators", "--num-runs", "0"], "--num-runs"),
        (["operators", "--enable-config-search", "--dtype", "float32"], "--enable-config-search"),
        (["flash", "--dtypes", "bf16"], "--dtypes"),
        (["flash", "--head-dims", "a"], "--head-dims"),
        (["memory", "--seq-lens", "-5"], "--seq-lens"),
        (["bytes", "--impl", "mine"], "--impl"),
        (["bytes", "--tile", "64"], "--tile"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_named(arguments, complaint):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert complaint in result.output


@pytest.mark.parametrize(
    ("arguments", "timing", "sum_ops", "lengths"),
    [
        ([], DEFAULTS, True, operators.LENGTHS["cpu"]),
        (
            ["--warmup-ms", 1, "--rep-ms", 2, "--num-runs", 4],
            DEFAULTS._replace(warmup_ms=1, rep_ms=2, num_runs=4),
            True,
            None,
        ),
        (["--no-sum-ops", "--seq-lens", "64,128"], DEFAULTS, False, (64, 128)),
        (
            ["--enable-config-search", "--config-search-trials", 7, "--config-search-warmup", 8],
            DEFAULTS._replace(search=True, search_trials=7, search_warmup=8),
            True,
            None,
        ),
    ],
    ids=["defaults", "times", "no sums", "search"],
)
def test_operators_hands_its_options_on(arguments, timing, sum_ops, lengths, monkeypatch, tmp_path):
    calls = []

    def rows(*args, **kwargs):
        calls.append(args)
        yield {"n": 64, "operator": "attention", "status": "wrong"}

    monkeypatch.setattr(operators, "operator_rows", rows)
    result = invoke("operators", "--device", "cpu", "--output", tmp_path / "deep" / "result.json", *arguments)
    assert result.exit_code == 0, result.output
    given = calls[0]
    assert (given[3], given[7]) == (timing, sum_ops)
    assert lengths is None or given[0] == lengths
    assert "On the CPU" in result.output
    assert "WRONG" in result.output
    written = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert written["provenance"]["torch"] == torch.__version__.split("+")[0]
    assert set(written) >= {"provenance", "ceilings", "heads", "timing", "rows"}
    assert (tmp_path / "deep" / "result.csv").exists()
    assert (tmp_path / "deep" / "result.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
@pytest.mark.parametrize("command", ["forward", "backward", "fp8", "sums"])
def test_commands_for_a_gpu_only_say_so(command):
    result = invoke(command)
    assert result.exit_code == 2
    assert "GPU" in result.output


@pytest.mark.parametrize("command", ["search", "decode"])
def test_a_cpu_compares_pytorch_with_pytorch(command, monkeypatch, tmp_path):
    from benchmark import cpu

    small = cpu.cpu_rows
    monkeypatch.setattr(
        cpu, "cpu_rows", lambda **given: small(**(given | {"n_k": 64, "n_q": min(64, given.get("n_q", 64))}))
    )
    monkeypatch.setattr(cpu, "median_ms", lambda call, *times: (call(), 1.0)[1])
    result = invoke(command, "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "need a GPU" in result.output.replace("\n", " ")
    rows = json.loads((tmp_path / f"{command}_cpu.json").read_text())["rows"]
    assert {row["method"].split(",")[0] for row in rows} == {"naive", "tiled PyTorch"}
    assert all(row["right"] and "ms" in row and "beyond_mb" in row for row in rows)


def test_flash_goes_on_where_its_csv_ends(tmp_path):
    command = ["flash", "--device", "cpu", "--out", tmp_path, "--head-dims", 16]
    assert invoke(*command, "--seq-lens", 16).exit_code == 0
    result = invoke(*command, "--seq-lens", "16,32")
    assert "3 finished rows" in result.output
    rows = json.loads((tmp_path / "flash.json").read_text())["rows"]
    assert [(row["n"], row["method"]) for row in rows] == [(n, m) for n in (16, 32) for m in flash.methods("cpu")]
    (tmp_path / "flash.csv").write_text("other,columns\n1,2\n")
    assert invoke(*command).exit_code == 2


def test_a_run_on_a_cpu_leaves_the_recorded_results_alone():
    assert run.place(None, "cpu").resolve() != run.HERE
    assert run.place(None, "cuda") == run.HERE


def test_the_environment_is_left_as_it_was(tmp_path):
    before = os.environ.get("TRITON_INTERPRET")
    invoke("bytes", "--tile", "64x32x16", "--out", tmp_path)
    assert os.environ.get("TRITON_INTERPRET") == before
