"""Every notebook runs from top to bottom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(*notebooks):
    """Run notebooks in a process of their own; return its exit code and what it said."""
    pytest.importorskip("nbformat", reason="Jupyter is not installed")
    pytest.importorskip("IPython", reason="Jupyter is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/run_notebooks.py"), *map(str, notebooks)]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process.returncode, process.stdout


@pytest.mark.parametrize("notebooks", [NOTEBOOKS[::2], NOTEBOOKS[1::2]], ids=["even", "odd"])
def test_notebooks_run(notebooks):
    code, said = run(*notebooks)
    assert code == 0, said[-4000:]


def test_a_cell_that_raises_is_told(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="Jupyter is not installed")
    for name, last in (("right", "assert x == 1"), ("wrong", "assert x == 2")):
        cells = [nbformat.v4.new_code_cell(source) for source in ("%matplotlib inline\nx = 1", last, "print('on')")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    code, said = run(tmp_path / "right.ipynb", tmp_path / "wrong.ipynb")
    assert code == 1
    assert "wrong.ipynb: cell 1 raised" in said
    assert said.count("on\n") == 1
