"""The eviction experiment: its sequences, the wrong sums that it shows, and what was recorded."""

import json

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from course import eviction_experiment
from course.eviction_experiment import (
    BUDGETS,
    HAYSTACK,
    NEEDLE,
    OCCURRENCES,
    ONE_PASS,
    PANELS,
    PICTURE,
    POLICIES,
    RECORD,
    TASKS,
    draw,
    measure_all,
    one_pass_sums,
    summary,
)
from course.model import CONTEXT
from stage1_pytorch_tiled.dense import naive_attention


@pytest.mark.parametrize("task", TASKS)
def test_eviction_sequences_fit_and_repeat(task):
    ids, n_context, n_free = TASKS[task](3, 0)
    assert ids.shape[0] == 3
    assert n_context + n_free < ids.shape[1] <= CONTEXT
    assert torch.equal(ids, TASKS[task](3, 0).ids)
    assert not torch.equal(ids, TASKS[task](3, 1).ids)


def test_eviction_needles_stand_in_the_first_half():
    for row in TASKS["retrieval"](4, 0).ids:
        needle = row[-NEEDLE:]
        found = (row.unfold(0, NEEDLE, 1) == needle).all(-1).nonzero().flatten()
        assert len(found) == OCCURRENCES + 1
        assert found[-1] == HAYSTACK
        assert found[-2] + NEEDLE <= HAYSTACK // 2


def test_eviction_one_pass_sums_are_what_the_first_visit_of_a_tile_knows():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 11, 8)
    logits = naive_attention(q, k, k, causal=True, sm_scale=8**-0.5).scores  # 0 where hidden
    hidden = torch.ones(5, 11, dtype=torch.bool).triu(11 - 5 + 1)
    logits = logits.masked_fill(hidden, -torch.inf)
    expected = torch.zeros(2, 2, 11)
    for j in range(11):
        seen = logits[..., : 4 * (j // 4) + 4].amax(-1)  # up to the end of the key's own tile
        expected[..., j] = (logits[..., j] - seen).exp().unflatten(1, (2, 2)).sum((2, 3))
    actual = one_pass_sums(q, k, tile=4)
    torch.testing.assert_close(actual, expected)
    right = naive_attention(q, k, k, causal=True).softmax_col_sum
    torch.testing.assert_close(right.sum(-1), torch.full((2, 2), 10.0))  # queries of a group of two
    assert (actual.sum(-1) > 12).all()


def test_eviction_experiment_measures_and_draws():
    policies = {name: POLICIES[name] for name in ("H2O", ONE_PASS)}
    rows = measure_all(seeds=2, batch=2, budgets=(1.0, 0.25), tasks=("retrieval",), policies=policies)
    found = summary(rows, "retrieval", "accuracy")
    assert {name: set(each) for name, each in found.items()} == {"full": {1.0}, "H2O": {0.25}, ONE_PASS: {0.25}}
    assert {row["tokens"] for row in rows} == {HAYSTACK, HAYSTACK // 4}
    assert found["full"][1.0][0] > 0.8 > found["H2O"][0.25][0]
    (panel,) = draw(rows).axes
    means = panel.get_lines()[1].get_ydata()
    assert list(means) == [found["H2O"][0.25][0], found["full"][1.0][0]]


def test_eviction_record_says_what_the_lesson_says():
    record = json.loads(RECORD.read_text())
    rows, about = record["rows"], record["provenance"]
    n_cells = len(TASKS) * (1 + len(POLICIES) * (len(BUDGETS) - 1))
    assert len(rows) == n_cells * about["seeds"]
    assert about["seeds"] >= 3
    mean = {
        task: {name: {share: x[0] for share, x in each.items()} for name, each in summary(rows, task, quantity).items()}
        for task, (quantity, *_) in PANELS.items()
    }
    full = {task: each.pop("full")[1.0] for task, each in mean.items()}
    assert min(full["copy"], full["retrieval"]) > 0.9, "the model itself can do it"
    for share in BUDGETS[1:]:
        assert all(each[share] < 1.1 * share for each in mean["copy"].values())
        assert mean["retrieval"]["StreamingLLM"][share] < 0.1
        assert mean["text"]["random"][share] == max(each[share] for each in mean["text"].values())
    for share in (0.25, 0.12, 0.06):
        assert mean["retrieval"]["H2O"][share] > 1.25 * mean["retrieval"][ONE_PASS][share]
        assert mean["retrieval"][ONE_PASS][share] < mean["retrieval"]["random"][share] + 0.02
        assert mean["text"]["H2O"][share] < mean["text"][ONE_PASS][share]


def test_eviction_picture_is_there():
    with Image.open(PICTURE) as picture:
        assert picture.width >= 600
        assert len(picture.convert("L").getcolors()) > 16


def test_eviction_command_measures_a_policy_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from flash_attention_with_scores.eviction import StreamingLLM\n\nclass Mine(StreamingLLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(eviction_experiment, "measure_all", short_run)
    app = typer.Typer()
    app.command()(eviction_experiment.main)
    arguments = ["--seeds", "1", "--batch", "1", "--policy", "mine:Mine", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / RECORD.name).read_text())
    assert {row["policy"] for row in record["rows"]} == {"full", "Mine"}
    assert (tmp_path / PICTURE.name).stat().st_size > 0


def short_run(seeds, batch, policies):
    """The last policy on the shortest task only."""
    name = list(policies)[-1]
    return measure_all(seeds, batch, (1.0, 0.5), ("copy",), {name: policies[name]})
