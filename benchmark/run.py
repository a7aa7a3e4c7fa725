"""`python -m benchmark.run COMMAND`: measurements on a GPU, kept with machine, versions and commit."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from stage2_triton_forward.interpreter import use_interpreter_without_gpu

app = typer.Typer(add_completion=False, no_args_is_help=True)
Out = Annotated[Path, typer.Option(help="Folder for the result.")]
RESULTS = Path(__file__).parent / "results"


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


@app.command()
def forward(out: Out = RESULTS) -> None:
    """Time the forward pass beside cuDNN, FlashAttention-2 and FlexAttention, in TFLOP/s."""
    need_gpu()
    from benchmark.forward import forward_rows
    from benchmark.measure import save

    rows = forward_rows()
    save("forward", rows, out)
    show(rows, ["shape", "ours", "cuDNN", "SDPA-FA2", "FlexAttention", "right"], Console(width=120))


@app.command()
def decode(out: Out = RESULTS) -> None:
    """Time one query against long caches, in GB/s and as a share of the machine's copy rate."""
    need_gpu()
    from benchmark.forward import decode_rows
    from benchmark.measure import save

    rows = decode_rows()
    save("decode", rows, out)
    show(rows, ["n", "ms", "GB/s", "copy GB/s", "share", "right"], Console(width=120))


@app.command()
def fp8(out: Out = RESULTS) -> None:
    """Measure the error of fp8 inputs against float64."""
    need_gpu()
    from benchmark.forward import fp8_rows
    from benchmark.measure import save

    rows = fp8_rows()
    save("fp8", rows, out)
    show(rows, ["dtype", "causal", "kernel_error", "quantisation_error"], Console(width=120))


@app.command()
def search(out: Out = RESULTS) -> None:
    """Search for the forward loop's tile sizes, for `tile_config.py`."""
    need_gpu()
    from benchmark.measure import save
    from benchmark.search import search as find

    rows = find()
    save("search", rows, out)
    best, console = {}, Console(width=120)
    for row in rows:
        best.setdefault(row["shape"], []).append(row)
    show(
        [r for some in best.values() for r in some[:4]], ["shape", "config", "tflops", "stack_bytes", "right"], console
    )


if __name__ == "__main__":
    app()
