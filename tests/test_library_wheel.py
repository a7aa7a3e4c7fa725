"""The library's wheel: what it holds, what it asks for, and the README's snippet in a place that has nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from flash_attention_with_scores import __version__

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).parent.parent
PACKAGES = (
    "flash_attention_with_scores",
    "stage1_pytorch_tiled",
    "stage2_triton_forward",
    "stage3_scores_and_sums",
    "stage4_backward",
)
NEWER_NUMPY = "numpy>=2.4"  # which the interpreter refuses, and the library does not mind
ONLY_THE_LIBRARY = """
import importlib.util
import sys
from pathlib import Path

import flash_attention_with_scores as library

assert Path(library.__file__).is_relative_to(sys.prefix), library.__file__
assert library.__version__ == "{version}"
for absent in ("benchmark", "course", "pytest", "transformers", "stage1_pytorch_tiled.exercise"):
    assert importlib.util.find_spec(absent) is None, absent
"""


def run(*command, cwd=ROOT):
    """Run a command without what points to this environment and this repository; return what it printed."""
    away = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")
    environment = {name: x for name, x in os.environ.items() if name not in away}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    said = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, f"{' '.join(map(str, command))} failed:\n{said[-6000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The library's wheel, built from the repository."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not here")
    if os.environ.get("UV_OFFLINE"):
        pytest.skip("UV_OFFLINE is set, and uv may have to fetch packages")
    folder = tmp_path_factory.mktemp("wheel")
    run("uv", "build", "--wheel", "--python", sys.executable, "--out-dir", str(folder))
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_library_and_the_stages_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    about = f"flash_attention_with_scores-{__version__}.dist-info"
    wanted = {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    for package in PACKAGES:
        files = [file.relative_to(ROOT) for file in (ROOT / package).rglob("*.py")]
        wanted |= {file.as_posix() for file in files if "exercise" not in file.parts}
        wanted.add(f"{package}/py.typed")
    assert names == wanted


def test_the_wheel_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(name).decode())
    assert about["Version"] == __version__
    assert about["License-Expression"] == "Apache-2.0"
    assert set(about.get_all("Provides-Extra")) == {"heatmap", "huggingface", "interpreter"}
    required = about.get_all("Requires-Dist")
    always = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert always == {"torch", "triton"}
    assert [line for line in required if line.startswith("numpy")] == ["numpy<2.4; extra == 'interpreter'"]


def test_the_snippet_of_the_readme_runs_from_the_wheel(wheel, tmp_path):
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    locked = run(
        *("uv", "export", "--locked", "--no-dev", "--extra", "heatmap", "--no-hashes", "--no-header"),
        *("--no-emit-workspace", "--no-emit-package", "numpy"),
    )
    (tmp_path / "locked.txt").write_text(locked)
    run("uv", "venv", "--python", sys.executable, str(tmp_path / "venv"))
    given = (f"{wheel}[heatmap]", NEWER_NUMPY, "--constraints", str(tmp_path / "locked.txt"))
    run("uv", "pip", "install", "--python", str(python), *given)

    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "snippet.py"
    script.write_text(ONLY_THE_LIBRARY.format(version=__version__) + snippet)
    run(str(python), str(script), cwd=script.parent)
    assert (script.parent / "scores.png").exists()
