"""Random calls of every public operator, on both backends and in all memory layouts, held against the formulas.

A run is a seed and a range of case numbers; what is drawn is said in `fuzz_case.py`, what is compared and how closely
in `fuzz_check.py` and `fuzz_tolerance.py`. Any case can be run again alone. On a GPU kernels are compiled, which takes
a second and more where their constants are new: give `--seconds` there.
"""

import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count, islice
from typing import NamedTuple

import torch

from benchmark.fuzz_case import draw_case
from benchmark.fuzz_check import Verdict, check_case
from benchmark.record import Record, TimeLimit
from benchmark.tables import show

COLUMNS = ["operator", "backend", "cases", "gradients", "refused", "wrong", "closest"]
_AT_A_TIME = 16  # cases that a process is handed


class Run(NamedTuple):
    """Which cases are drawn."""

    seed: int
    device: str = "cpu"
    operator: str = ""  # those whose name contains this
    backend: str = ""  # those of this backend
    triton_share: float | None = None

    def draw(self, number: int):
        """Return a case of this run."""
        share = {"triton": 1.0, "pytorch": 0.0}.get(self.backend, self.triton_share)
        return draw_case(self.seed, number, self.device, share)

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of the cases that are asked for, without end."""
        for number in count():
            if not self.operator or self.operator in self.draw(number).operator:
                yield number

    def command(self, number: int) -> str:
        """Return what runs a case again."""
        options = {"backend": self.backend, "triton-share": self.triton_share}
        given = "".join(f" --{name} {x}" for name, x in options.items() if x not in ("", None))
        return f"python -m benchmark.run fuzz --seed {self.seed} --case {number} --device {self.device}{given}"


def run_cases(run: Run, n_cases: int, seconds: float, n_processes: int, record: Record, say, console) -> int:
    """Run cases, print what disagrees as it comes, then a table; keep both in the record; return the exit code."""
    start, cpu_before = time.monotonic(), _cpu_seconds()
    say(f"seed {run.seed}: {n_cases or 'endless'} cases on {run.device}")
    found = []
    try:
        for verdict in verdicts(run, n_cases, TimeLimit(seconds), n_processes):
            found.append(verdict)
            if verdict.faults:
                command = run.command(verdict.number)
                for line in (*verdict.lines, f"  again: {command}"):
                    say(line)
                disagreement = {"case": verdict.number, "faults": verdict.faults, "again": command}
                record.extra["disagreements"].append(disagreement)
                record.write()
    except KeyboardInterrupt:
        say("interrupted")
    record.rows = table(found)
    wall, cpu = time.monotonic() - start, _cpu_seconds() - cpu_before
    record.extra |= {"seconds": wall, "cpu_seconds": cpu, "processes": n_processes, "cases": len(found)}
    record.write()
    show(record.rows, COLUMNS, console)
    wrong = sum(bool(x.faults) for x in found)
    say(f"seed {run.seed}: {len(found)} cases in {wall:.1f} s, {cpu:.0f} s of CPU; {wrong} disagree")
    say(f"written: {record.path('.json')}")
    return 1 if wrong else 0


def report_case(run: Run, number: int, say) -> int:
    """Run one case and say all about it; return the exit code."""
    with _nan_in_new_memory():
        verdict = check_case(run.draw(number), in_detail=True)
    for line in verdict.lines:
        say(line)
    say("wrong" if verdict.faults else f"right: {verdict.kind}, at most {verdict.closest:.2f} of what is allowed")
    return 1 if verdict.faults else 0


def verdicts(run: Run, n_cases: int, limit: TimeLimit, n_processes: int = 1) -> Iterator[Verdict]:
    """Run cases until there were so many, or the time is up; 0 cases for no end."""
    numbers = iter(run.numbers())
    numbers = islice(numbers, n_cases) if n_cases else numbers
    batches = iter(lambda: tuple(islice(numbers, _AT_A_TIME)), ())
    if n_processes == 1:
        torch.set_num_threads(1)
        for batch in batches:
            for number in batch:
                if limit.reached():
                    return
                yield check_numbers(run, (number,))[0]
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(n_processes, _one_thread) as pool:
        pending = []
        for batch in batches:
            pending.append(pool.apply_async(check_numbers, (run, batch)))
            while len(pending) >= 2 * n_processes:
                yield from _take_ready(pending)
            if limit.reached():
                pending = []
                break
        while pending:
            yield from _take_ready(pending)


def check_numbers(run: Run, numbers: tuple[int, ...]) -> list[Verdict]:
    """Run the cases of these numbers."""
    with _nan_in_new_memory():
        return [check_case(run.draw(number)) for number in numbers]


def table(found: list[Verdict]) -> list[dict]:
    """Return a row for each operator and backend, and one for all."""
    rows = []
    for operator, backend in sorted({(x.operator, x.backend) for x in found}):
        rows.append(_row(operator, backend, [x for x in found if (x.operator, x.backend) == (operator, backend)]))
    return [*rows, _row("all", "both", found)]


def _row(operator: str, backend: str, found: list[Verdict]) -> dict:
    kinds = [x.kind for x in found]
    return {
        "operator": operator,
        "backend": backend,
        "cases": len(found),
        "gradients": kinds.count("gradients"),
        "refused": kinds.count("refused"),
        "wrong": sum(bool(x.faults) for x in found),
        "closest": round(max((x.closest for x in found), default=0.0), 3),
    }


def _take_ready(pending: list) -> list[Verdict]:
    """Wait a moment for the oldest batch; take those that are done out of `pending`."""
    pending[0].wait(0.05)
    done = [x for x in pending if x.ready()]
    pending[:] = [x for x in pending if x not in done]
    return [verdict for x in done for verdict in x.get()]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _cpu_seconds() -> float:
    """Return what this process and those that it started and outlived have used, whatever else ran beside them."""
    return sum(os.times()[:4])


class _nan_in_new_memory(nullcontext):
    """Within, `torch.empty` is filled with NaN, so that an element that was never written cannot look right."""

    def __enter__(self):
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        warnings.filterwarnings("ignore", message=".* does not have a deterministic implementation")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # numpy's, of -inf - (-inf)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(self.before, warn_only=self.before)
