"""Runs notebooks from top to bottom, each in a fork of one process that has the heavy packages.

`python tests/run_notebooks.py a.ipynb b.ipynb`; exit code 1 where a cell raises. Nothing is written back: to renew what
the notebooks show, `jupyter nbconvert --to notebook --inplace --execute` them.
"""

import os
import sys
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from matplotlib_inline.config import InlineBackend

HEAVY = ("torch", "triton", "transformers", "matplotlib.figure")


class Shell(InteractiveShell):
    """What a notebook's kernel is, without a window or a browser to show things in."""

    def enable_gui(self, gui=None):
        """Do nothing: pictures are drawn, and nobody looks."""


def run(path: Path) -> int:
    """Run the cells in a fork; return its exit code: 0, or 1 where a cell raised, as said on standard output."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_run_cells(path))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_cells(path: Path) -> int:
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent))
    shell = Shell.instance(colors="nocolor")
    InlineBackend.instance(parent=shell).print_figure_kwargs = {"bbox_inches": None}  # "tight" draws each picture twice
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code" and not shell.run_cell(cell.source, store_history=True).success:
            print(f"{path.name}: cell {number} raised", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # until a notebook asks for its own
    from course.mutants import import_installed
    from stage2_triton_forward.interpreter import use_interpreter_without_gpu

    use_interpreter_without_gpu()
    import_installed(*HEAVY)
    codes = [run(Path(name).resolve()) for name in sys.argv[1:]]
    sys.exit(any(codes))
