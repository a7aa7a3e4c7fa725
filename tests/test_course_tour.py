"""The main job: `course tour`."""

import pytest
import torch
from conftest import TRITON_MODE
from PIL import Image
from typer.testing import CliRunner

from course import implementations as registry
from course import tour as tour_module
from course.cli import app
from course.largest_tensor import LargestTensor
from course.model import CONTEXT

PICTURES = ["scores.png", "weights.png", "heads.png", "tile_order.png"]


def run(*arguments):
    return CliRunner().invoke(app, ["tour", *map(str, arguments)])


def test_tour_grades_everything_and_draws(tmp_path):
    result = run("--out", tmp_path / "new" / "folder", "--text", "to be, or not to be")
    assert result.exit_code == 0, result.output
    names = [implementation.name for implementation in registry.implementations(TRITON_MODE)]
    assert result.output.count("right") == len(names) >= 3
    assert "WRONG" not in result.output
    for name in PICTURES:
        with Image.open(tmp_path / "new" / "folder" / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("L").getcolors(1 << 16)) > 8, f"{name} is blank"


def test_chosen_layer_and_head(tmp_path):
    result = run("--out", tmp_path, "--text", "abcabc", "--layer", 1, "--head", 3)
    assert result.exit_code == 0, result.output
    assert "layer 1, head 3" in result.output


def test_one_byte_is_enough(tmp_path):
    assert run("--out", tmp_path, "--text", "a").exit_code == 0


@pytest.mark.parametrize("mistake", ["value", "nan", "shape"])
def test_a_wrong_implementation_fails_the_tour(tmp_path, monkeypatch, mistake):
    def wrong(q, k, v):
        output = registry._naive(q, k, v)["output"]
        if mistake == "shape":
            return {"output": output[:, :1]}
        output = output.clone()
        output[0, 0, -1, 0] += {"value": 1e-3, "nan": float("nan")}[mistake]
        return {"output": output}

    wrong_one = registry.Implementation("a wrong one", "9", "PyTorch", wrong)
    monkeypatch.setattr(tour_module, "implementations", lambda mode: [wrong_one])
    result = run("--out", tmp_path, "--text", "abc")
    assert result.exit_code == 1
    assert "WRONG" in result.output
    assert "a wrong one" in result.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--text", ""], "--text is empty"),
        (["--text", "  \n"], "--text is empty"),
        (["--text", "x" * (CONTEXT + 1)], f"--text is {CONTEXT + 1} bytes long; the model's context is {CONTEXT}"),
        (["--text", "é" * (CONTEXT // 2 + 1)], f"--text is {CONTEXT + 2} bytes long"),
        (["--layer", "5"], "--layer 5 does not exist: the model has layers 0 to 4"),
        (["--layer", "-1"], "--layer -1 does not exist"),
        (["--head", "4"], "--head 4 does not exist: the model has heads 0 to 3"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be made"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_2(tmp_path, arguments, complaint):
    out = [] if "--out" in arguments else ["--out", tmp_path]
    result = run(*out, *arguments)
    assert result.exit_code == 2
    assert complaint in result.output
    assert result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot be made" in result.output


def test_arguments_that_are_not_numbers():
    assert run("--layer", "first").exit_code == 2


def test_largest_tensor_counts_memory_not_shape():
    x = torch.randn(10, 20)
    with LargestTensor() as largest:
        x.expand(1000, 10, 20)
        x[:5].sum()
    assert largest.bytes == 10 * 20 * 4  # the view's storage
    with LargestTensor() as largest:
        x @ x.T
        torch.empty(50, 7, dtype=torch.float64)
    assert largest.bytes == 50 * 7 * 8
