"""Where results go: rows are written as they come, so that a run that is interrupted keeps what it has finished."""

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from course.provenance import provenance

PROGRESS = (TextColumn("{task.description}, {task.completed:.0f} rows"), TimeElapsedColumn())
ORIGIN = ("device", "torch", "triton", "commit", "date")  # what each row of a CSV names beside its figures


class Record:
    """Rows in `STEM.json` and, where columns are given, `STEM.csv`, written anew with every row that is added."""

    def __init__(self, stem: Path, columns: tuple[str, ...] = (), extra: dict | None = None):
        """Start without rows.

        Args:
            stem: where to; a suffix such as .json is left out.
            columns: of the CSV; empty for none.
            extra: what the JSON holds beside provenance and rows.
        """
        self.stem = stem.with_suffix("") if stem.suffix in (".json", ".csv", ".png") else stem
        self.columns, self.extra = columns, extra or {}
        self.rows: list[dict] = []
        self.origin = provenance()

    def resume(self) -> None:
        """Take over the rows of the CSV, if there is one.

        Raises:
            ValueError: it has other columns.
        """
        path = self.path(".csv")
        if not path.exists():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != (*self.columns, *ORIGIN):
                raise ValueError(f"{path} has other columns than this command writes: move it away to start anew")
            self.rows = [{name: _number(value) for name, value in row.items() if value != ""} for row in reader]

    def add(self, row: dict) -> None:
        """Add a row, and write all."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the files; each takes its place whole, so that an interruption leaves the last one."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.path(".json"), json.dumps(self.result(), indent=1) + "\n")
        if self.columns:
            origin = {name: self.origin[name] for name in ORIGIN}
            lines = _Lines()
            writer = csv.DictWriter(lines, (*self.columns, *ORIGIN), extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(origin | row for row in self.rows)
            _replace(self.path(".csv"), "".join(lines))

    def result(self) -> dict:
        """Return what the JSON holds."""
        return {"provenance": self.origin, **self.extra, "rows": self.rows}

    def path(self, suffix: str) -> Path:
        """Return the path of one of the files."""
        return self.stem.with_name(self.stem.name + suffix)


class TimeLimit:
    """Says when a run has used up the time that it was given; a limit of 0 never does."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, time.monotonic()

    def reached(self) -> bool:
        """Return whether nothing new should be begun."""
        return bool(self.seconds) and time.monotonic() - self.start >= self.seconds


def keep(rows: Iterable[dict], record: Record, describe: Callable[[dict], str], console: Console) -> bool:
    """Add rows to a record as they come, and print each; return False where Ctrl-C ended them early."""
    start = time.monotonic()
    with Progress(SpinnerColumn(), *PROGRESS, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)
        try:
            for row in rows:
                record.add(row)
                text = f"[{time.monotonic() - start:6.1f} s] {describe(row)}"
                console.print(text, markup=False, highlight=False)
                progress.advance(task)
        except KeyboardInterrupt:
            console.print(f"interrupted: {len(record.rows)} finished rows are kept")
            return False
    return True


def within(limit: TimeLimit, cells: Iterable, say: Callable[[str], None]) -> Iterator:
    """Yield cells until the time limit; then say how many were left out."""
    cells = list(cells)
    for done, cell in enumerate(cells):
        if limit.reached():
            say(f"time limit of {limit.seconds:.0f} s: {len(cells) - done} of {len(cells)} not begun")
            return
        yield cell


class _Lines(list):
    """A list that a CSV writer can write to."""

    write = list.append


def _replace(path: Path, text: str) -> None:
    """Write a file beside its place and move it there."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    draft.replace(path)


def _number(text: str) -> str | int | float:
    """Return a CSV's cell as the number that it may be."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
