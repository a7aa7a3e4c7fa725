"""README says what is true: its figures, its links and its code."""

import re
from pathlib import Path

import pytest

from benchmark import render
from course.model import report

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_figures_are_those_of_the_training_report():
    measured = report()
    head = measured["best_induction_head"]
    expected = {
        "parameters": f"{measured['parameters']:,}",
        "validation_loss": f"{measured['validation_loss']:.3f}",
        "validation_loss_bits_per_byte": f"{measured['validation_loss_bits_per_byte']:.3f}",
        "induction_score": f"{head['score']:.3f}",
        "induction_ratio": f"{head['ratio']:.0f}",
    }
    assert dict(re.findall(r"<!-- (\w+) -->(.*?)<!-- -->", TEXT)) == expected


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "stage1_pytorch_tiled/README.md",
        "stage2_triton_forward/README.md",
        "stage3_scores_and_sums/README.md",
        "stage4_backward/README.md",
        "flash_attention_with_scores/eviction/README.md",
        "course/text/README.md",
    ],
    ids=["front", "contributing", "changes", "lesson 1", "lesson 2", "lesson 3", "lesson 4", "lesson 5", "texts"],
)
def test_links_lead_somewhere(file):
    page = ROOT / file
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.parent.name.split("_")[-1])
def test_tables_are_those_of_the_recorded_results(page):
    text = page.read_text()
    assert render.render(text) == text, "run python -m benchmark.render"


def test_pictures_are_those_of_the_recorded_results():
    assert render.stale_pictures() == [], "run python -m benchmark.render"
    for name in re.findall(r"\]\(benchmark/results/(\w+)\.png\)", TEXT):
        assert render.digest_in(render.RESULTS / f"{name}.png")


def test_recorded_results_name_their_origin_and_are_right():
    for file in render.RESULTS.glob("*.json"):
        recorded = render.load(file.stem)
        assert set(recorded["provenance"]) >= {"device", "torch", "triton", "transformers", "commit", "date"}
        assert re.fullmatch(r"[0-9a-f]{40}", recorded["provenance"]["commit"])
        ours = [row for row in recorded["rows"] if row.get("method", "ours").startswith("ours")]
        assert ours
        right = [row.get("right", True) and row.get("status") != "wrong" for row in ours]
        assert all(right), f"{file.name} holds a wrong answer of the library's"


def test_library_examples_run(tmp_path, monkeypatch):
    plain, huggingface = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(plain, "README.md", "exec"), {})
    assert (tmp_path / "scores.png").exists()
    monkeypatch.chdir(ROOT)  # where the model is
    names = {}
    exec(compile(huggingface, "README.md", "exec"), names)
    assert names["output"].shape == (1, names["ids"].shape[1] + 32)
    assert {layer.keys.shape[2] for layer in names["cache"].layers} == {64}


def test_the_two_commands_are_there():
    assert "pip install uv && uv run course tour" in TEXT
    assert re.search(r"^uv run pytest\b", TEXT, re.MULTILINE)
