"""The training proof: a model trained with the library's attention follows the one trained with PyTorch's."""

import json
import math

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from course import training_proof
from course.training_proof import PICTURE, RUNS, compare_runs, draw, largest_difference, losses, recorded

CPU_BOUND = 1e-4  # fp32
BF16_BOUND = 2e-2


def test_losses_agree_in_fp32():
    rows = compare_runs(12, batch=4, context=64)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(math.isfinite(row[name]) for row in rows for name in RUNS)
    assert rows[-1]["sdpa"] < rows[0]["sdpa"] - 0.5, "nothing was learnt, so nothing was compared"
    assert largest_difference(rows) < CPU_BOUND
    assert largest_difference(rows, "plain") < CPU_BOUND
    assert largest_difference(rows, "without_grad_k") > 10 * CPU_BOUND, "the proof would not notice a wrong gradient"


def test_attention_is_the_librarys(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return attention(*args, **kwargs)

    attention = training_proof.attention
    monkeypatch.setattr(training_proof, "attention", counted)
    losses(RUNS["sdpa"], 1, batch=2, context=32)
    assert not calls
    losses(RUNS["ours"], 2, batch=2, context=32)
    assert len(calls) == 2 * training_proof.SIZES["num_hidden_layers"]
    assert all(call["causal"] for call in calls)


def test_a_mask_is_refused():
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="no padding"):
        training_proof._attend(None, x, x, x, torch.zeros(1, 1, 4, 4))


def test_same_seed_gives_the_same_losses():
    settings = {"steps": 2, "batch": 2, "context": 32}
    first = losses(RUNS["ours"], **settings)
    assert losses(RUNS["ours"], **settings) == first
    assert losses(RUNS["ours"], **settings, seed=1) != first


@pytest.mark.gpu
def test_losses_agree_in_bf16():
    rows = compare_runs(30, device="cuda")
    assert rows[-1]["sdpa"] < rows[0]["sdpa"] - 0.5
    assert largest_difference(rows) < BF16_BOUND
    assert largest_difference(rows) < 4 * largest_difference(rows, "plain") + 1e-3


def test_recorded_curves_agree():
    records = recorded()
    assert "cpu" in records, "run `python -m course.training_proof`"
    for device, record in records.items():
        rows, about = record["rows"], record["provenance"]
        assert all(about[name] for name in ("device", "torch", "transformers", "commit", "date", "dtype"))
        assert len(rows) == about["steps"] >= 200
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        last = slice(-20, None)
        final = {name: sum(row[name] for row in rows[last]) / len(rows[last]) for name in RUNS}
        assert final["sdpa"] < rows[0]["sdpa"] / 2
        if device == "cpu":
            assert largest_difference(rows) < CPU_BOUND
        else:
            assert abs(final["ours"] - final["sdpa"]) < BF16_BOUND
        assert largest_difference(rows, "without_grad_k") > 100 * CPU_BOUND


def test_picture_is_there_and_drawn_from_the_records():
    with Image.open(PICTURE) as picture:
        assert picture.width >= 600
        assert len(picture.convert("L").getcolors()) > 16
    fig = draw(recorded())
    curves = fig.axes[0].get_lines()
    rows = recorded()["cpu"]["rows"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in curves}
    assert drawn["PyTorch's attention"] == [row["sdpa"] for row in rows]
    assert drawn["the library's"] == [row["ours"] for row in rows]


def test_command_writes_record_and_picture(tmp_path):
    app = typer.Typer()
    app.command()(training_proof.main)
    arguments = ["--steps", "2", "--batch", "2", "--context", "32", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "training.json").read_text())
    assert set(record) == {"provenance", "rows"}
    assert [row["step"] for row in record["rows"]] == [1, 2]
    assert (tmp_path / PICTURE.name).stat().st_size > 0
