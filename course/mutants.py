"""Makes the mistakes of `course/mistakes.py` one at a time, and runs the test that must catch each."""

import gc
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NoReturn

import pytest

from course.mistakes import MISTAKES, Mistake
from stage2_triton_forward.interpreter import use_interpreter_without_gpu

ROOT = Path(__file__).parent.parent


def outcomes(names: list[str]) -> list[dict[str, str]]:
    """Try mistakes in a fresh process, which imports the heavy packages once and then forks for each mistake.

    The kernels run interpreted, on a machine with a GPU too.

    Returns:
        For each: `name`; `outcome`, "caught" when its test ran and failed by assertion, "missed" when it passed,
        "crashed" for anything else; `said`, what pytest printed.
    """
    command = [sys.executable, "-P", "-m", "course.mutants", *names]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}  # a fork cannot use its parent's GPU
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return [json.loads(line) for line in run.stdout.splitlines()]


def attempt(mistake: Mistake) -> dict[str, str]:
    """Make one mistake in a copy of its stage, and run the test that must catch it in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(mistake.file).parts[0]
        shutil.copytree(ROOT / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        patch(Path(folder) / mistake.file, mistake)
        log, report = Path(folder) / "log.txt", Path(folder) / "report.xml"
        _, status = os.waitpid(start_tests([mistake.caught_by], folder, log, report), 0)
        return {"name": mistake.name, "outcome": outcome_of(status, report), "said": log.read_text(errors="replace")}


def start_tests(tests: list[str], folder: str, log: Path, report: Path, cpu_seconds: int | None = None) -> int:
    """Run tests in a forked process, until the first fails, with the packages in `folder` in front of the real ones.

    Args:
        tests: files or test ids, from the folder of tests on.
        log: what pytest prints.
        report: what it finds, as JUnit's XML.
        cpu_seconds: after which the process is killed.

    Returns:
        its process id, to be waited for.
    """
    child = os.fork()
    if child == 0:
        _run_tests(tests, folder, log, report, cpu_seconds)
    return child


def outcome_of(status: int, report: Path) -> str:
    """Say from a process' exit status and its report what became of a mistake: see `outcomes`."""
    if status == 0:
        return "missed"
    try:
        failures = [failure.get("message", "") for failure in ET.parse(report).iter("failure")]
    except (FileNotFoundError, ET.ParseError):
        return "crashed"
    by_assertion = failures and all(message.startswith(("AssertionError", "assert ")) for message in failures)
    return "caught" if by_assertion else "crashed"


def _run_tests(tests: list[str], folder: str, log: Path, report: Path, cpu_seconds: int | None) -> NoReturn:
    code = 70
    try:
        if cpu_seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path.insert(0, folder)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        arguments = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
        arguments += ["-x", "-q", f"--junitxml={report}"]
        code = int(pytest.main([*arguments, *(str(ROOT / "tests" / test) for test in tests)]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def patch(file: Path, mistake: Mistake) -> None:
    """Replace the right lines by the wrong ones; they must occur exactly once."""
    text = file.read_text()
    if text.count(mistake.right) != 1:
        raise ValueError(
            f"{mistake.name}: {mistake.file} holds its right line {text.count(mistake.right)} times, not once"
        )
    file.write_text(text.replace(mistake.right, mistake.wrong))


def import_once() -> None:
    """Import what is slow, before the forks, and none of the packages that are tried in a wrong copy."""
    use_interpreter_without_gpu()
    packages = ("stage", "flash_attention_with_scores")
    for name in [name for name in sys.modules if name.startswith(packages)]:
        del sys.modules[name]  # each child imports its own, wrong copy
    import_installed("hypothesis", "torch", "triton", "transformers.masking_utils", "transformers.cache_utils")
    gc.freeze()  # nor does a child look for garbage in all that


def import_installed(*modules: str) -> None:
    """Import modules whose packages are installed, before the forks that would each import them again."""
    for name in modules:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)


def main() -> None:
    """Try the mistakes named on the command line, or all; print one JSON object a line."""
    import_once()
    chosen = sys.argv[1:]
    for mistake in MISTAKES:
        if not chosen or mistake.name in chosen:
            print(json.dumps(attempt(mistake)), flush=True)


if __name__ == "__main__":
    main()
