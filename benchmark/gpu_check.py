"""`bash .ci/gpu`: everything that has to be checked on a CUDA machine, with one table at the end.

The suite with compiled kernels, the fuzzer, and compute-sanitizer's memcheck on small launches of every kernel. Needs
no network, and of packages what the suite needs. The exit code is 1 where anything failed or is missing; what cannot
run on such a machine is named below the table, with the reason, and counts neither way.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from rich.console import Console

from benchmark import tables
from benchmark.record import Record, keep
from course.tasks import ROOT
from stage2_triton_forward.interpreter import why_not_interpreted

COLUMNS = ["check", "outcome", "passed", "failed", "skipped", "seconds", "note"]
CHECKS = ("suite", "fuzz", "memcheck")
PYTEST = ["-m", "pytest", "-o", "addopts=", "--strict-markers", "-p", "no:cacheprovider", "-q", "--tb=short"]
PYTEST += ["-m", "not thorough"]
TESTS_FAILED, NOTHING_COLLECTED = 1, 5  # exit codes of pytest that are no accident
NOT_RUN = "not run"

Run = Callable[[list[str], Path], int]


class Options(NamedTuple):
    """What the command line asked for."""

    out: Path
    workers: int  # processes that share the GPU while the suite runs
    seconds: float  # for the fuzzer
    stages: list[str]  # that memcheck looks at
    tests: list[str]  # what pytest is given; [] for the whole suite


class Counts(NamedTuple):
    """Tests by outcome, and why some were skipped."""

    passed: int
    failed: int
    skipped: int
    reasons: dict[str, int]


def run_logged(command: list[str], log: Path) -> int:
    """Run a command in the repository, kernels compiled, append what it says to a log, and return its exit code."""
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as file:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode


def count(reports: list[Path]) -> Counts:
    """Add up pytest's XML reports."""
    outcomes, reasons = Counter(), Counter()
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            outcomes[outcome] += 1
            if outcome == "skipped":
                reasons[case.find("skipped").get("message") or "no reason given"] += 1
    return Counts(outcomes["passed"], outcomes["failed"], outcomes["skipped"], dict(reasons))


def suite(options: Options, run: Run, has_xdist: bool) -> dict:
    """Run the test suite in several processes: by pytest-xdist, or a file at a time where that is not installed."""
    if has_xdist:
        jobs = [[*options.tests, "-n", str(options.workers), "--dist", "worksteal"]]
    else:
        files = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py"))
        jobs = [[test] for test in options.tests or files]
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{number}.xml" for number in range(len(jobs))]
        logs = [report.with_suffix(".log") for report in reports]
        commands = [
            [sys.executable, *PYTEST, *job, f"--junitxml={report}"] for job, report in zip(jobs, reports, strict=True)
        ]
        with ThreadPoolExecutor(1 if has_xdist else options.workers) as pool:
            codes = list(pool.map(run, commands, logs))
        for job, code, report in zip(jobs, codes, reports, strict=True):
            if code not in (0, TESTS_FAILED, NOTHING_COLLECTED) or not report.exists():
                broken.append(f"exit code {code} of pytest {' '.join(job)}")
        counts = count([report for report in reports if report.exists()])
        log = options.out / "suite.log"
        log.write_bytes(b"".join(part.read_bytes() for part in logs if part.exists()))
    if not counts.passed:
        broken.append("no test passed")
    failed = bool(broken) or counts.failed > 0 or TESTS_FAILED in codes
    how = "pytest-xdist" if has_xdist else "one test file each, for want of pytest-xdist"
    notes = [*broken, f"{options.workers} processes, {how}", *([f"see {log}"] if failed else [])]
    return {"outcome": "failed" if failed else "passed", **counts._asdict(), "note": "; ".join(notes)}


def fuzz(options: Options, run: Run) -> dict:
    """Run the fuzzer for a while."""
    log, result = options.out / "fuzz.log", options.out / "fuzz.json"
    result.unlink(missing_ok=True)
    arguments = ["--device", "cuda", "--cases", "0", "--seconds", f"{options.seconds:g}", "--out", str(options.out)]
    arguments += ["--processes", str(options.workers)]
    code = run([sys.executable, "-m", "benchmark.run", "fuzz", *arguments], log)
    if code and "No such command" in log.read_text(errors="replace"):
        return {"outcome": "missing", "note": "benchmark.run has no command `fuzz`"}
    found = json.loads(result.read_text()) if result.exists() else {"cases": 0, "disagreements": []}
    wrong = len(found["disagreements"])
    failed = bool(code or wrong) or not found["cases"]
    notes = [f"{found['cases']} random cases", *([f"exit code {code}, see {log}"] if failed else [])]
    counts = {"passed": found["cases"] - wrong, "failed": wrong}
    return {"outcome": "failed" if failed else "passed", **counts, "note": "; ".join(notes)}


def memcheck(options: Options, run: Run) -> dict:
    """Look for memory errors of every kernel of the stages asked for, each stage in a process of its own."""
    if shutil.which("compute-sanitizer") is None:
        return {"outcome": NOT_RUN, "note": "compute-sanitizer is not installed"}
    log = options.out / "memcheck.log"
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", sys.executable]
    bad = [stage for stage in options.stages if run([*tool, "-m", "benchmark.sanitize", stage], log)]
    notes = [f"{len(options.stages)} stages", *([f"stage {', '.join(bad)} failed: see {log}"] if bad else [])]
    counts = {"passed": len(options.stages) - len(bad), "failed": len(bad)}
    return {"outcome": "failed" if bad else "passed", **counts, "note": "; ".join(notes)}


def rows(checks: dict[str, Callable[[], dict]], chosen: list[str], say: Callable[[str], None]) -> Iterator[dict]:
    """Run the checks that were chosen one after the other, and yield a row for each check there is."""
    for name, check in checks.items():
        if name not in chosen:
            yield {"check": name, "outcome": NOT_RUN, "note": "not asked for"}
            continue
        say(f"{name} …")
        start = time.monotonic()
        result = check()
        yield {"check": name, **result, "seconds": round(time.monotonic() - start, 1)}


def not_run(reasons: dict[str, int]) -> list[str]:
    """Return a line for everything that this run says nothing about.

    Args:
        reasons: why tests of the suite were skipped, and how many.
    """
    lines = [
        "notebooks, packages of other versions (transformers 4, kvpress): `uv run pytest -m thorough` runs them",
        "exercises: `uv run pytest --impl exercise` grades them",
    ]
    if reason := why_not_interpreted():
        lines.append(f"the mutant gate, but for stage 1: {reason}")
    return lines + [f"{number} skipped in the suite: {reason}" for reason, number in sorted(reasons.items())]


def report(record: Record, console: Console) -> bool:
    """Print one table of everything, and what was not run; return whether nothing failed or is missing."""
    tables.show(record.rows, COLUMNS, console)
    reasons = next((row["reasons"] for row in record.rows if "reasons" in row), {})
    console.print("Not run here:", *not_run(reasons), sep="\n  ", markup=False, highlight=False, soft_wrap=True)
    record.extra["not_run"] = not_run(reasons)
    record.write()
    console.print(f"written: {record.path('.json')}", markup=False, highlight=False, soft_wrap=True)
    return all(row["outcome"] in ("passed", NOT_RUN) for row in record.rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(prog="bash .ci/gpu", description=__doc__.split("\n\n")[0])
    out = Path(os.environ.get("OUT") or "benchmark_output/gpu")
    parser.add_argument(
        "--out", type=Path, default=out, help="folder for gpu.json and logs; default: $OUT, or %(default)s"
    )
    workers = int(os.environ.get("WORKERS") or max(1, 3 * (os.cpu_count() or 1) // 4))
    parser.add_argument(
        "--workers", type=int, default=workers, help="test processes; default: $WORKERS, or 3/4 of the cores"
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="run these checks and no others")
    parser.add_argument("--seconds", type=float, default=60, help="for the fuzzer; default: %(default)s")
    parser.add_argument("--stages", nargs="+", choices=("2", "3", "4"), default=["2", "3", "4"], help="for memcheck")
    parser.add_argument("--tests", nargs="+", default=[], help="test files or ids for the suite; default: all")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, run: Run = run_logged) -> int:
    """Run the checks, print the table, and return the exit code."""
    given = parse(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: needs a CUDA GPU, and there is none here")
        return 2
    options = Options(given.out.resolve(), given.workers, given.seconds, given.stages, given.tests)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in CHECKS:
        (options.out / f"{name}.log").unlink(missing_ok=True)
    console = Console(width=None if Console().is_terminal else 150)
    numpy = importlib.metadata.version("numpy")
    record = Record(options.out / "gpu", extra={"python": platform.python_version(), "numpy": numpy})
    checks = {
        "suite": partial(suite, options, run, importlib.util.find_spec("xdist") is not None),
        "fuzz": partial(fuzz, options, run),
        "memcheck": partial(memcheck, options, run),
    }

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    whole = keep(rows(checks, given.only, say), record, lambda row: f"{row['check']}: {row['outcome']}", console)
    return 0 if report(record, console) and whole else 1


if __name__ == "__main__":
    sys.exit(main())
