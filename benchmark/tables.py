"""Results in a terminal."""

from rich.console import Console
from rich.table import Table


def cell(value: object) -> str:
    """Return a value as a table shows it: a nested result by its TFLOP/s."""
    value = value.get("tflops", "-") if isinstance(value, dict) else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(row: dict, columns: list[str]) -> str:
    """Return a finished row as a line of text."""
    return "  ".join(f"{column} {cell(row[column])}" for column in columns if column in row)


def show(rows: list[dict], columns: list[str], console: Console) -> None:
    """Print rows as a table."""
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if column != columns[0] else "left")
    for row in rows:
        table.add_row(*(cell(row.get(column, "")) for column in columns))
    console.print(table)


def operator_summary(row: dict) -> str:
    """Return a row of `operators` as a line of text."""
    return f"N = {row['n']:6d}  {row['operator']:32s} {operator_cell(row).replace(chr(10), '  ')}"


def operator_cell(row: dict) -> str:
    """Return time, speed-up over naive PyTorch, and rate with its share of the ceiling; or what prevented them."""
    if row["status"] != "ok":
        return row["status"].upper() if row["status"] == "wrong" else row["status"]
    speedup = f"{row['speedup']:.1f}×" if "speedup" in row else "–"
    return f"{row['ms']:.3f} ms  {speedup}\n{row['rate']:.3g} {row['unit']} ({100 * row['share']:.0f} %)"


def show_operators(rows: list[dict], console: Console) -> None:
    """Print methods down and lengths across."""
    table = Table(
        caption="median ms, speed-up over naive PyTorch, rate (share of the measured ceiling)", show_lines=True
    )
    table.add_column("method")
    cells = {(row["operator"], row["n"]): operator_cell(row) for row in rows}
    lengths = list(dict.fromkeys(row["n"] for row in rows))
    for n in lengths:
        table.add_column(f"N = {n}", justify="right")
    for operator in dict.fromkeys(row["operator"] for row in rows):
        table.add_row(operator, *(cells.get((operator, n), "") for n in lengths))
    console.print(table)
