"""The course's tasks, read from the `tasks.toml` beside every stage's exercises."""

import tomllib
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent  # where the stages lie
EXERCISES = ("stage*/exercise", "flash_attention_with_scores/*/exercise")  # the folders of exercises, within ROOT


class Task(NamedTuple):
    """One thing to write, and all that a learner is told about it."""

    id: str  # "1.3": the stage, then the number within it
    title: str
    folder: str  # the exercise folder, relative to the repository
    file: str  # within the folder
    function: str  # qualified name, such as TileGrid.visibility
    goal: str
    shapes: str
    equation: str
    source: str
    hints: list[str]  # three, of growing strength
    points: int
    minutes: int
    test: str  # the -k expression that selects the tests that grade it

    @property
    def path(self) -> str:
        """The file to edit, relative to the repository."""
        return f"{self.folder}/{self.file}"

    @property
    def command(self) -> str:
        """The command that grades the task."""
        return f'uv run pytest -k "{self.test}" --impl exercise'


def all_tasks() -> list[Task]:
    """Return the tasks of every stage that has exercises, in the order of the course."""
    tasks = [
        Task(folder=file.parent.relative_to(ROOT).as_posix(), **entry)
        for folder in EXERCISES
        for file in ROOT.glob(f"{folder}/tasks.toml")
        for entry in tomllib.loads(file.read_text(encoding="utf-8"))["task"]
    ]
    return sorted(tasks, key=lambda task: [int(number) for number in task.id.split(".")])


def find_task(id: str) -> Task | None:
    """Return the task of this number, or None."""
    return next((task for task in all_tasks() if task.id == id), None)


def render_task(task: Task, level: int, console: Console) -> None:
    """Print what a task asks for, how it is graded, and its first `level` hints."""
    worth = f"{task.points} points, about {task.minutes} minutes"
    console.print(Text.assemble((f"Task {task.id}: {task.title}", "bold"), (f"  ({worth})", "dim")))
    facts = Table.grid(padding=(0, 2), pad_edge=False)
    facts.add_column(style="bold cyan", no_wrap=True)
    facts.add_column()
    write = f"{task.function} in {task.path}"
    goal = " ".join(task.goal.split())  # its line breaks are the file's, those of shapes and equation are meant
    rows = {"write": write, "goal": goal, "shapes": task.shapes, "equation": task.equation, "source": task.source}
    rows |= {f"hint {number}": text for number, text in enumerate(task.hints[:level], 1)}
    for name, text in rows.items():
        facts.add_row(name, Text(text.strip()))  # Text, because [B, Hq, M] would be taken for markup
    console.print(Padding(facts, (1, 0)))
    console.print(Text.assemble(("Grade it: ", "bold"), task.command), soft_wrap=True)  # unbroken, to be copied
    if level < len(task.hints):
        console.print(Text(f"A stronger hint: uv run course hint {task.id} --level {level + 1}", "dim"), soft_wrap=True)
