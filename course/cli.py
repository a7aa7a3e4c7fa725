"""The `course` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stage2_triton_forward.interpreter import use_interpreter_without_gpu

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def course() -> None:
    """Build FlashAttention stage by stage, and see real attention on the way."""


@app.command()
def tour(
    text: Annotated[str | None, typer.Option(help="What the model reads, up to 512 bytes.")] = None,
    layer: Annotated[
        int | None, typer.Option(help="Whose attention is drawn; default: the best induction head's.")
    ] = None,
    head: Annotated[int | None, typer.Option(help="The head within the layer.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("tour_output"),
) -> None:
    """Run a real model's attention through every implementation, grade each against float64, and draw heatmaps."""
    triton_mode = use_interpreter_without_gpu()  # before the imports below bring in triton
    from course.tour import DEFAULT_TEXT, BadArgument, run_tour

    try:
        right = run_tour(DEFAULT_TEXT if text is None else text, layer, head, out, triton_mode, Console())
    except BadArgument as error:
        print(f"course tour: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    if not right:
        raise typer.Exit(1)


@app.command()
def hint(
    task: Annotated[str, typer.Argument(help="The task's number, such as 1.3.")],
    level: Annotated[int, typer.Option(min=1, max=3, help="How strong a hint: 1, 2 or 3.")] = 1,
) -> None:
    """Show what a task asks for, and a hint."""
    from course.tasks import find_task, render_task

    found = find_task(task)
    if found is None:
        print(f"course hint: there is no task {task}", file=sys.stderr)
        raise typer.Exit(2)
    render_task(found, level, Console())


def main() -> None:
    """Entry point of the `course` script."""
    app()
