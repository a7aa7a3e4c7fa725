"""`python -m benchmark.run COMMAND`: measurements on a GPU, kept with machine, versions and commit."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmark.render import RESULTS
from stage2_triton_forward.interpreter import use_interpreter_without_gpu

app = typer.Typer(add_completion=False, no_args_is_help=True)
Out = Annotated[Path, typer.Option(help="Folder for the result.")]


def need_gpu() -> None:
    """Leave with one line where no GPU is present: the interpreter's speed says nothing about a kernel's."""
    if use_interpreter_without_gpu() != "compiled":
        print("benchmark: this measures kernels on a GPU, and there is none here")
        raise typer.Exit(2)


def show(rows: list[dict], columns: list[str], console: Console) -> None:
    """Print rows as a table; nested results show their TFLOP/s."""
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column != columns[0] else "left")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        cells = [c.get("tflops", "-") if isinstance(c, dict) else c for c in cells]
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    console.print(table)


def record(name: str, rows: list[dict], columns: list[str], out: Path) -> None:
    """Save rows as `out`/`name`.json and print some of their columns."""
    from benchmark.measure import save

    save(name, rows, out)
    show(rows, columns, Console(width=120))


@app.command()
def forward(out: Out = RESULTS) -> None:
    """Time the forward pass beside cuDNN, FlashAttention-2 and FlexAttention, in TFLOP/s."""
    need_gpu()
    from benchmark.forward import forward_rows

    record("forward", forward_rows(), ["shape", "ours", "cuDNN", "SDPA-FA2", "FlexAttention", "right"], out)


@app.command()
def decode(out: Out = RESULTS) -> None:
    """Time one query against long caches, in GB/s and as a share of the machine's copy rate."""
    need_gpu()
    from benchmark.forward import decode_rows

    record("decode", decode_rows(), ["n", "ms", "GB/s", "copy GB/s", "share", "right"], out)


@app.command()
def fp8(out: Out = RESULTS) -> None:
    """Measure the error of fp8 inputs against float64."""
    need_gpu()
    from benchmark.forward import fp8_rows

    record("fp8", fp8_rows(), ["dtype", "causal", "kernel_error", "quantisation_error"], out)


@app.command()
def scores(out: Out = RESULTS) -> None:
    """Time scores, sums and statistics beside plain attention and its peers, in ms."""
    need_gpu()
    from benchmark.scores import score_rows

    record("scores", score_rows(), ["operator", "n", "ms", "ratio", "eager_ms", "right"], out)


@app.command()
def sums(out: Out = RESULTS) -> None:
    """Measure the sums' memory at N = 131072, their accuracy at N = 65536, and what contended atomics cost."""
    need_gpu()
    from benchmark.scores import accuracy_rows, contention_rows, memory_rows

    record("memory", memory_rows(), ["operator", "n", "beyond_mb", "scores_mb", "sum_error"], out)
    record("accuracy", accuracy_rows(), ["sum", "algorithm", "dtype", "n", "max_error", "relative"], out)
    record("contention", contention_rows(), ["order", "n", "causal", "ms"], out)


@app.command()
def backward(out: Out = RESULTS) -> None:
    """Time the backward pass beside cuDNN, FlashAttention-2 and FlexAttention, in TFLOP/s."""
    need_gpu()
    from benchmark.backward import backward_rows

    record("backward", backward_rows(), ["shape", "ours", "cuDNN", "SDPA-FA2", "FlexAttention", "right"], out)


@app.command()
def search(out: Out = RESULTS) -> None:
    """Search for the forward loop's tile sizes, for `tile_config.py`; rows come best first for each shape."""
    need_gpu()
    from benchmark.search import search as find

    record("search", find(), ["shape", "config", "tflops", "registers", "stack_bytes", "right"], out)


if __name__ == "__main__":
    app()
