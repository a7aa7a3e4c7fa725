"""Makes the mistakes of `course/mistakes.py` one at a time, and runs the test that must catch each."""

import json
import os
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
        child = os.fork()
        if child == 0:
            _run_test(mistake, folder, log, report)
        _, status = os.waitpid(child, 0)
        said = log.read_text(errors="replace")
        if not report.exists():
            return {"name": mistake.name, "outcome": "crashed", "said": said}
        failures = [failure.get("message", "") for failure in ET.parse(report).iter("failure")]
        by_assertion = failures and all(message.startswith(("AssertionError", "assert ")) for message in failures)
        outcome = "missed" if status == 0 else "caught" if by_assertion else "crashed"
        return {"name": mistake.name, "outcome": outcome, "said": said}


def _run_test(mistake: Mistake, folder: str, log: Path, report: Path) -> NoReturn:
    """Run the test with the copy in front of the real package; never returns."""
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path.insert(0, folder)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the notebooks' plugin alone takes seconds to load
        arguments = ["-o", "addopts=", "-p", "no:cacheprovider", "-x", "-q", f"--junitxml={report}"]
        code = int(pytest.main([*arguments, str(ROOT / "tests" / mistake.caught_by)]))
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


def main() -> None:
    """Try the mistakes named on the command line, or all; print one JSON object a line."""
    use_interpreter_without_gpu()
    packages = ("stage", "flash_attention_with_scores")
    for name in [name for name in sys.modules if name.startswith(packages)]:
        del sys.modules[name]  # each child imports its own, wrong copy
    import hypothesis  # noqa: F401  (the slow imports, once and before the forks)
    import torch  # noqa: F401

    chosen = sys.argv[1:]
    for mistake in MISTAKES:
        if not chosen or mistake.name in chosen:
            print(json.dumps(attempt(mistake)), flush=True)


if __name__ == "__main__":
    main()
