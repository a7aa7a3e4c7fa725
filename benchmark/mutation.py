"""Mutation testing: changes one place of the code at a time, and counts the changes that no test notices.

    python -m benchmark.mutation --sample 300 --jobs 2
    python -m benchmark.mutation --file eviction/cache.py --sample 0

The heavy packages are imported once; each mutant is a copy of its package, tried in a forked process by the tests named
for its file, until one fails. (mutmut leaves decorated functions alone, which all kernels are; cosmic-ray starts a
process that imports torch for each mutant.)
"""

import argparse
import ast
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from course.mutants import ROOT, import_once, outcome_of, start_tests

from .mutation_cases import EQUIVALENT, ONLY, TESTS
from .record import Record, TimeLimit, within

RESULT = ROOT / "benchmark" / "results" / "mutation.json"
KEY = ("file", "function", "was", "became")
OUTCOMES = ("killed by assertion", "killed otherwise", "timeout", "survived", "equivalent")
_COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
_TWINS = {"min": "max", "amin": "amax", "minimum": "maximum", "any": "all"}
_TWINS |= {b: a for a, b in _TWINS.items()}
_MODELS = ("llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "bart")
_UNARY = {ast.Not: "not", ast.USub: "-", ast.Invert: "~"}


class Mutant(NamedTuple):
    """A change of one place."""

    file: str
    function: str  # around it
    line: int
    kind: str
    was: str  # the first line that changes, stripped
    became: str
    source: str  # all of the changed file

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function} ({self.kind})\n  - {self.was}\n  + {self.became}"


def mutants(file: str, source: str) -> list[Mutant]:
    """Return every change of one place that the operators make, in the order of the source."""
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for (start, stop), kind, new, function in sorted(_Finder(data, starts).found):
        changed = (data[:start] + new.encode() + data[stop:]).decode()
        line = data[:start].count(b"\n")
        was, became = (x.splitlines()[line:] for x in (source, changed))
        same = next((i for i, pair in enumerate(zip(was, became, strict=False)) if pair[0] != pair[1]), 0)
        texts = (was[same].strip(), became[same].strip())
        found.append(Mutant(file, function, line + same + 1, kind, *texts, changed))
    return found


class _Finder:
    """Walks a syntax tree, and notes (bytes to replace, kind, replacement, function); leaves text and types alone."""

    def __init__(self, data: bytes, starts: list[int]):
        self.data, self.starts, self.function, self.found = data, starts, "", set()
        self.visit(ast.parse(data))

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def note(self, kind: str, span: tuple[int, int], new: str) -> None:
        self.found.add((span, kind, new, self.function))

    def swap(self, kind: str, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replace the operator between two operands."""
        start, stop = self.span(left)[1], self.span(right)[0]
        words = r"\s+".join(map(re.escape, old.split()))
        match = re.search(rf"\b{words}\b" if old[0].isalpha() else words, self.data[start:stop].decode())
        self.note(kind, (start + match.start(), start + match.end()), new)

    def text(self, node: ast.AST) -> str:
        start, stop = self.span(node)
        return self.data[start:stop].decode()

    def visit(self, node: ast.AST) -> None:
        outside = self.function
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.function = f"{outside}.{node.name}".strip(".")
        if isinstance(node, ast.stmt):
            self.statement(node)
        elif isinstance(node, ast.expr):
            self.expression(node)
        for child in self.children(node):
            self.visit(child)
        self.function = outside

    def children(self, node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom | ast.arg) or _is_speed(node):
            return  # text, names and types; what changes no result
        nones = isinstance(node, ast.Compare | ast.Tuple)  # `is None` has an operator to swap; [:, None] has no other
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "bases"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and not (nones and getattr(child, "value", 0) is None):
                        yield child

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.If | ast.While):
            self.negate(node.test)
        if isinstance(node, ast.AugAssign):
            self.swap("assignment", node.target, node.value, _ARITHMETIC[type(node.op)][0] + "=", "=")
        told = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant | ast.Yield)
        places = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
        early = isinstance(node, ast.Return) and node.col_offset > 4 + 4 * self.function.count(".")
        if (told or places or early or isinstance(node, ast.AugAssign | ast.Raise)) and self.function:
            self.note("dropped statement", self.span(node), "pass")

    def expression(self, node: ast.expr) -> None:
        match node:
            case ast.Compare():
                for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                    self.swap("comparison", left, right, *_COMPARISONS[type(op)])
            case ast.BinOp() if type(node.op) in _ARITHMETIC and not _is_type(node.right):
                self.swap("arithmetic", node.left, node.right, *_ARITHMETIC[type(node.op)])
            case ast.BoolOp():
                old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:], strict=False):
                    self.swap("logic", left, right, old, new)
            case ast.UnaryOp() if type(node.op) in _UNARY:
                self.note("sign", self.span(node), f"({self.text(node.operand)})")
            case ast.IfExp():
                self.negate(node.test)
            case ast.Constant():
                self.constant(node)
            case ast.Call():
                self.call(node)

    def negate(self, node: ast.expr) -> None:
        self.note("condition", self.span(node), f"(not ({self.text(node)}))")

    def constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.note("constant", self.span(node), str(not node.value))
        elif isinstance(node.value, int | float):
            for new in (node.value - 1, node.value + 1):
                self.note("constant", self.span(node), f"({new})" if new < 0 else str(new))
        elif node.value is None:
            self.note("constant", self.span(node), "0")

    def call(self, node: ast.Call) -> None:
        _, stop = self.span(node.func)
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        if name in _TWINS:
            self.note("min and max", (stop - len(name), stop), _TWINS[name])
        parts = sorted(map(self.span, [*node.args, *node.keywords]))
        for keyword in (self.span(x) for x in node.keywords if not _is_speed(x)):
            i = parts.index(keyword)
            if i + 1 < len(parts):
                self.note("dropped argument", (keyword[0], parts[i + 1][0]), "")
            else:
                self.note("dropped argument", (parts[i - 1][1] if i else keyword[0], keyword[1]), "")


def _is_type(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("int", "float", "list", "tuple", "Tensor", "str")


def _is_speed(node: ast.AST) -> bool:
    return isinstance(node, ast.keyword) and node.arg in ("num_warps", "num_stages")


def attempt_all(chosen: Iterable[Mutant], tests: dict[str, list[str]], jobs: int, cpu_seconds: int) -> Iterator[tuple]:
    """Yield (mutant, outcome, what pytest said) of each, as they end."""
    waiting, running = iter(chosen), {}
    while True:
        while len(running) < jobs and (mutant := next(waiting, None)):
            folder = tempfile.mkdtemp()
            package = Path(mutant.file).parts[0]
            shutil.copytree(ROOT / package, Path(folder, package), ignore=shutil.ignore_patterns("__pycache__"))
            Path(folder, mutant.file).write_text(mutant.source)
            files = Path(folder, "log.txt"), Path(folder, "report.xml")
            child = start_tests(tests[mutant.file], folder, *files, cpu_seconds)
            running[child] = mutant, folder, *files, time.monotonic() + 8 * cpu_seconds
        if not running:
            return
        time.sleep(0.05)
        for child, (mutant, folder, log, report, deadline) in list(running.items()):
            if time.monotonic() > deadline:  # it waits for something that does not come
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del running[child]
                yield mutant, _outcome(mutant, status, report), log.read_text(errors="replace") if log.exists() else ""
                shutil.rmtree(folder)


def _outcome(mutant: Mutant, status: int, report: Path) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return "timeout"
    outcome = outcome_of(status, report)
    if outcome != "missed":
        return "killed by assertion" if outcome == "caught" else "killed otherwise"
    return "equivalent" if is_equivalent(mutant) else "survived"


def is_equivalent(mutant: Mutant) -> bool:
    """Return whether the mutant is one of those that are known to change nothing that a caller could see."""
    return key_of(mutant) in {x[:4] for x in EQUIVALENT}


def key_of(mutant: Mutant) -> tuple[str, str, str, str]:
    """Return what names a mutant, wherever its line has gone meanwhile."""
    return tuple(getattr(mutant, name) for name in KEY)


def sampled(files: Iterable[str], sample: int, seed: int) -> list[Mutant]:
    """Return mutants of all files in random order, that depends on nothing but the seed: so many, or all for 0."""
    everything = [mutant for file in files for mutant in mutants(file, (ROOT / file).read_text()) if _runs(mutant)]
    return random.Random(seed).sample(everything, min(sample or len(everything), len(everything)))


def _runs(mutant: Mutant) -> bool:
    """Return whether the mutant's function runs where mutants are tried, which is a CPU."""
    return mutant.file not in ONLY or mutant.function in ONLY[mutant.file]


def counts(results: Iterable[tuple[Mutant, str]]) -> list[dict]:
    """Return one row a file: its mutants, and how many met each outcome."""
    outcomes: dict[str, Counter] = {}
    for mutant, outcome in results:
        outcomes.setdefault(mutant.file, Counter())[outcome] += 1
    names = {name: name.replace(" ", "_") for name in OUTCOMES}
    return [
        {"file": file, "mutants": found.total(), **{names[name]: found[name] for name in OUTCOMES}}
        for file, found in sorted(outcomes.items())
    ]


def table(rows: list[dict]) -> Table:
    """Return the rows for the terminal, with their total."""
    shown = Table("file", "mutants", *OUTCOMES, title="mutants")
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name != "file"} if rows else {}
    for row in [*rows, {"file": "all", **total}]:
        shown.add_row(*map(str, row.values()))
    return shown


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    arguments = argparse.ArgumentParser(prog="python -m benchmark.mutation", description=__doc__.split("\n")[0])
    arguments.add_argument("--sample", type=int, default=300, help="how many mutants over all files; 0 for all")
    arguments.add_argument("--skip", type=int, default=0, help="the first so many of the sample, tried before")
    arguments.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments.add_argument("--file", action="append", default=[], help="only files whose path ends so; may repeat")
    arguments.add_argument("--only", default="", help="only mutants whose description holds this text")
    arguments.add_argument("--jobs", type=int, default=1, help="how many are tried at once")
    arguments.add_argument("--timeout", type=int, default=200, help="CPU seconds that a mutant may take")
    arguments.add_argument("--minutes", type=float, default=0, help="begin no mutant after so many; 0 for no limit")
    arguments.add_argument("--list", action="store_true", help="only print the mutants")
    again = "try the survivors of these records of different mutants again, and join the records"
    arguments.add_argument("--again", type=Path, nargs="+", default=[], help=again)
    arguments.add_argument("--out", type=Path, help=f"where to; {RESULT.relative_to(ROOT)} holds the last full run")
    return arguments


def main() -> None:
    """Try mutants, print those that survive, and count."""
    given, console = parser().parse_args(), Console(soft_wrap=True, width=None if sys.stdout.isatty() else 130)
    files = [file for file in TESTS if not given.file or file.endswith(tuple(given.file))]
    earlier = [json.loads(path.read_text()) for path in given.again]
    chosen = survivors(earlier) if earlier else sampled(files, given.sample, given.seed)[given.skip :]
    chosen = [mutant for mutant in chosen if given.only in str(mutant)]
    if given.list:
        console.print("\n".join(map(str, chosen)), markup=False, highlight=False)
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork cannot use its parent's GPU
    import_once()
    for name in _MODELS:  # which transformers imports late
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    known = [mutant for mutant in chosen if earlier and is_equivalent(mutant)]  # no need to see them survive again
    chosen = [mutant for mutant in chosen if mutant not in known]
    limit, results = TimeLimit(60 * given.minutes), [(mutant, "equivalent") for mutant in known]
    in_time = within(limit, chosen, partial(console.print, style="yellow"))
    extra = {"seed": given.seed, "of": len(sampled(TESTS, 0, 0))}
    for mutant, outcome, _ in attempt_all(in_time, TESTS, given.jobs, given.timeout):
        results.append((mutant, outcome))
        if outcome in ("survived", "timeout"):
            console.print(f"{outcome}: {mutant}", markup=False, highlight=False)
        print(f"{len(results)} of {len(chosen)}", end="\r", file=sys.stderr)
        if given.out:
            write(given.out, joined(earlier, results), results, extra)
    console.print(table(joined(earlier, results)))


def survivors(records: list[dict]) -> list[Mutant]:
    """Return the mutants that survived when these records were made, as far as the code still has their lines."""
    everything, found = sampled(TESTS, 0, 0), []
    for known in (mutant for record in records for mutant in record["survivors"]):
        alike = [mutant for mutant in everything if key_of(mutant) == tuple(known[name] for name in KEY)]
        found += sorted(alike, key=lambda mutant, line=known["line"]: abs(mutant.line - line))[:1]
    return found


def joined(records: list[dict], results: list[tuple[Mutant, str]]) -> list[dict]:
    """Return the counts of records of different mutants, with what became of their survivors when tried again."""
    if not records:
        return counts(results)
    rows: dict[str, dict] = {}
    for row in (row for record in records for row in record["rows"]):
        known = rows.setdefault(row["file"], dict.fromkeys(row, 0))
        rows[row["file"]] = {name: x if name == "file" else known[name] + x for name, x in row.items()}
    for mutant, outcome in results:
        rows[mutant.file]["survived"] -= 1
        rows[mutant.file][outcome.replace(" ", "_")] += 1
    return [rows[file] for file in sorted(rows)]


def write(out: Path, rows: list[dict], results: list[tuple[Mutant, str]], extra: dict) -> None:
    """Record the rows, and the mutants that survived."""
    left = [{name: getattr(mutant, name) for name in (*KEY, "line")} for mutant, x in results if x == "survived"]
    record = Record(out, extra=extra | {"survivors": left})
    record.rows = rows
    record.write()


if __name__ == "__main__":
    main()
