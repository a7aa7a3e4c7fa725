"""The mutant gate: every known mistake must be caught by its named test, by assertion and not by a crash."""

import importlib.util

import pytest

from course.mistakes import MISTAKES
from course.mutants import outcomes
from stage2_triton_forward.interpreter import why_not_interpreted

PACKAGES = list(dict.fromkeys(mistake.file.split("/")[0] for mistake in MISTAKES))  # in the order of the course


def test_names_are_unique():
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("package", PACKAGES, ids=range(1, len(PACKAGES) + 1))
def test_every_mistake_is_caught(package):
    reason = None if package == "stage1_pytorch_tiled" else why_not_interpreted()
    if reason:
        pytest.skip(reason)
    names = [mistake.name for mistake in MISTAKES if mistake.file.startswith(package)]
    results = outcomes(names)
    assert [result["name"] for result in results] == names
    not_caught = [result for result in results if result["outcome"] != "caught"]
    assert not not_caught, "\n".join(f"{r['name']} {r['outcome']}:\n{r['said'][-2000:]}" for r in not_caught)


@pytest.mark.parametrize(("numpy", "runs"), [("2.3.5", True), ("2.4.0", False), ("2.5.2", False)])
def test_a_numpy_that_is_too_new_for_the_interpreter_is_named(numpy, runs, monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    monkeypatch.setattr("importlib.metadata.version", lambda name: numpy)
    reason = why_not_interpreted()
    assert reason is None if runs else numpy in reason
    if not runs:
        with pytest.raises(pytest.skip.Exception, match="needs numpy below"):
            test_every_mistake_is_caught("stage2_triton_forward")


def test_a_numpy_that_is_missing_is_named(monkeypatch):
    pytest.importorskip("triton", reason="Triton has no wheels for this platform")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "numpy" else find_spec(name))
    assert "numpy (below 2.4), which is not installed" in why_not_interpreted()
