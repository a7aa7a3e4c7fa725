"""The main job: real queries, keys and values through every implementation, graded and drawn."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from course.grader import Comparison, compare
from course.implementations import Implementation, implementations
from course.largest_tensor import LargestTensor
from course.model import CONTEXT, capture_qkv, encode, load_model, report, token_labels
from flash_attention_with_scores.heatmap import plot_heads, plot_scores, plot_tile_order
from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.setting import Setting
from stage1_pytorch_tiled.tiled_forward import tiled_attention

DEFAULT_TEXT = "The Queen met the Duchess, and the King met the Queen. Then the Queen met the Duchess again."
TILE = 16


class BadArgument(Exception):
    """Something that the user asked for cannot be done; the message says what, in one line."""


class Graded(NamedTuple):
    """One row of the tour's table."""

    implementation: Implementation
    checked: list[str]  # names of the outputs that were compared
    worst: Comparison  # of the output that comes closest to its limit, or passes it by most
    largest_tensor: int  # bytes
    ok: bool


def run_tour(text: str, layer: int | None, head: int | None, out: Path, triton_mode: str, console: Console) -> bool:
    """Take a sentence through the model and through every implementation, print the table, draw the pictures.

    Args:
        text: what the model reads; at most CONTEXT bytes of UTF-8.
        layer, head: whose attention is drawn; None means the model's best induction head.
        out: folder for the pictures, made if need be.
        triton_mode: what `use_interpreter_without_gpu` returned.
        console: where the table goes.

    Returns:
        Whether every implementation agrees with the float64 oracle.

    Raises:
        BadArgument: see there.
    """
    n_tokens = check_text(text)
    layer, head = choose_head(layer, head)
    make_folder(out)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task("loading the model")
        model = load_model()
        progress.update(task, description=f"reading {n_tokens} bytes")
        layers = capture_qkv(model, encode(text))
        graded = grade_all(
            layers[layer], triton_mode, lambda name: progress.update(task, description=f"running {name}")
        )
        progress.update(task, description="drawing")
        pictures = draw(layers, layer, head, text, out)
    console.print(table_of(graded, layer, n_tokens))
    for picture, meaning in pictures.items():
        console.print(f"[bold]{picture}[/]  {meaning}", highlight=False, soft_wrap=True)
    failed = [g.implementation.name for g in graded if not g.ok]
    if failed:
        console.print(f"[red]wrong:[/] {', '.join(failed)}")
    return not failed


def check_text(text: str) -> int:
    """Return the number of tokens; refuse a text that is empty or does not fit the model."""
    if not text.strip():
        raise BadArgument("--text is empty: give the model at least one character to read")
    n_tokens = encode(text).shape[1]
    if n_tokens > CONTEXT:
        raise BadArgument(f"--text is {n_tokens} bytes long; the model's context is {CONTEXT}")
    return n_tokens


def choose_head(layer: int | None, head: int | None) -> tuple[int, int]:
    """Return the layer and head to draw; refuse ones that the model does not have."""
    measured = report()
    scores = measured["induction"]  # one list a layer, one number a head
    for option, value, count in (("layer", layer, len(scores)), ("head", head, len(scores[0]))):
        if value is not None and not 0 <= value < count:
            raise BadArgument(f"--{option} {value} does not exist: the model has {option}s 0 to {count - 1}")
    best = measured["best_induction_head"]
    if layer is None:
        layer = best["layer"]
    if head is None:
        head = best["head"] if layer == best["layer"] else 0
    return layer, head


def make_folder(out: Path) -> None:
    """Make the folder for the pictures; refuse a place that cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"--out {out} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise BadArgument(f"--out {out} cannot be written to")


def grade_all(qkv: tuple[Tensor, Tensor, Tensor], triton_mode: str, on_start=lambda name: None) -> list[Graded]:
    """Run every registered implementation on q, k and v and compare each output with the oracle."""
    oracle = naive_attention(*(x.double() for x in qkv), causal=True)
    naive = naive_attention(*qkv, causal=True)
    q, k, _ = qkv
    of_logits = 4 * torch.finfo(q.dtype).eps * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item() / q.shape[-1] ** 0.5
    on_device = [x.cuda() if triton_mode == "compiled" else x for x in qkv]
    graded = []
    for implementation in implementations(triton_mode):
        on_start(implementation.name)
        with torch.no_grad(), LargestTensor() as largest:
            outputs = implementation.run(*on_device)
        comparisons = {
            name: compare(x, getattr(oracle, name), getattr(naive, name), of_logits=of_logits)
            for name, x in outputs.items()
        }
        worst = max(comparisons.values(), key=lambda c: c.max_error / max(c.allowed, 1e-300))
        ok = all(c.ok for c in comparisons.values())
        graded.append(Graded(implementation, list(comparisons), worst, largest.bytes, ok))
    return graded


def table_of(graded: list[Graded], layer: int, n_tokens: int) -> Table:
    """Lay out the results for the terminal."""
    table = Table(
        title=f"layer {layer}, {n_tokens} tokens, against the float64 oracle",
        title_justify="left",
        box=SIMPLE,
        padding=0,
    )
    table.add_column("stage", justify="center")
    table.add_column("implementation")
    table.add_column("backend")
    for column in ("max\nerror", "allowed\nerror", "largest\ntensor"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for g in graded:
        table.add_row(
            g.implementation.stage,
            f"{g.implementation.name}\n[dim]{', '.join(g.checked)}[/]",
            g.implementation.backend.replace(" ", "\n"),
            f"{g.worst.max_error:.1e}",
            f"{g.worst.allowed:.1e}",
            f"{g.largest_tensor / 1024:.1f} KiB",
            "[green]right[/]" if g.ok else "[red]WRONG[/]",
        )
    return table


def draw(layers: list, layer: int, head: int, text: str, out: Path) -> dict[Path, str]:
    """Draw one head's scores and weights, all heads, and the tile order; return what each picture shows."""
    tokens = token_labels(text)
    everything = [naive_attention(*qkv, causal=True) for qkv in layers]
    chosen = everything[layer]
    where = f"layer {layer}, head {head}"
    visits = []
    q, k, v = (x[:, :1] for x in layers[layer])
    tiled_attention(
        q, k, v, Setting(causal=True), on_logits=lambda tile: visits.append((tile.q_rows.start, tile.k_cols.start))
    )
    figures = {
        "scores.png": (
            plot_scores(chosen.scores[0, head], tokens, title=f"Scores (scaled QKᵀ), {where}"),
            f"scores of {where}, with row and column sums",
        ),
        "weights.png": (
            plot_scores(chosen.weights[0, head], tokens, weights=True, title=f"Attention weights, {where}"),
            f"softmax weights of {where}, with the attention that each key received",
        ),
        "heads.png": (
            plot_heads(torch.cat([a.weights for a in everything]), tokens, suptitle="Attention weights of every head"),
            "the weights of every head of every layer",
        ),
        "tile_order.png": (
            plot_tile_order(
                visits, q.shape[2], k.shape[2], TILE, TILE, title=f"The {TILE}×{TILE} tiles, in the order of the loop"
            ),
            "which tiles the loop visits, and when",
        ),
    }
    for name, (figure, _) in figures.items():
        figure.savefig(out / name)
    return {out / name: meaning for name, (_, meaning) in figures.items()}
