"""One suite for every implementation and every machine: chooses what is graded, and says so in the summary."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if sys.dont_write_bytecode:  # dozens of processes start here: let them compile torch once, in a folder of our own
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parent.parent / ".pytest_cache/bytecode")
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

import torch

from stage2_triton_forward.interpreter import use_interpreter_without_gpu

TRITON_MODE = use_interpreter_without_gpu()  # before anything imports triton

torch.set_num_threads(1)  # pytest-xdist already keeps every core busy

if importlib.util.find_spec("hypothesis"):  # not where packages of other versions are tried
    from hypothesis import Phase, settings

    # The same examples at every run: no verdict hangs on luck. `--hypothesis-profile explore` looks for new ones.
    phases = [Phase.explicit, Phase.generate, Phase.shrink]  # to explain a failure takes 50 times as long as to find it
    settings.register_profile("suite", derandomize=True, deadline=None, database=None, phases=phases)
    settings.register_profile("explore", deadline=None)
    settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption(
        "--impl",
        choices=["reference", "exercise"],
        default="reference",
        help="grade the course's own code, or the learner's files in the folders exercise/",
    )
    parser.addoption(
        "--first-cases", action="store_true", help="of a test with many cases, run the first alone: a quick look at all"
    )


LONGEST = (
    "test_launcher.py",
    "test_kernels_compile.py",
    "test_notebooks.py",
    "test_course_mistakes.py",
    "test_course_exercises.py",
)


def pytest_collection_modifyitems(items, config):
    items.sort(key=lambda item: item.path.name not in LONGEST)  # begun last, they would keep one process waiting
    if config.getoption("--first-cases"):
        first = {(item.path, item.originalname): item for item in reversed(items)}
        kept = [item for item in items if first[item.path, item.originalname] is item]
        config.hook.pytest_deselected(items=[item for item in items if first[item.path, item.originalname] is not item])
        items[:] = kept
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter, config):
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    reasons = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason] = reasons.get(reason, 0) + 1
    write = terminalreporter.write_line
    terminalreporter.section("what was graded")
    write(f"implementation: {config.getoption('--impl')}")
    write(f"backend: {where}, Triton {TRITON_MODE}, torch {torch.__version__}")
    write(f"skipped: {sum(reasons.values())}")
    for reason, count in reasons.items():
        write(f"  {count} × {reason}")


@pytest.fixture
def device():
    """Where kernels run: the GPU if there is one, else the CPU (through Triton's interpreter)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def graded(request):
    """Import a module of the implementation under test: `graded("stage1_pytorch_tiled", "tiled_forward")`."""
    graded_suffix = {"reference": "", "exercise": ".exercise"}[request.config.getoption("--impl")]

    def load(package, module):
        if importlib.util.find_spec(package + graded_suffix) is None:
            pytest.fail(f"{package} has no exercises yet", pytrace=False)
        return importlib.import_module(f"{package}{graded_suffix}.{module}")

    return load


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialised tensors with NaN, so that an output that was never written cannot look right."""
    torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` would import the compiler
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
