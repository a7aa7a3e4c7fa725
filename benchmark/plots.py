"""Pictures of recorded results; each names the machine and the date, and carries a digest of what it shows."""

import hashlib
import json
from pathlib import Path

KEY = "Description"  # the field of a PNG that holds the digest
SHOWN = ("naive PyTorch with scores", "SDPA + separate scores", "attention", "scores", "row sum", "column sum")
SHOWN += ("softmax column sum", "cross-token softmax")

OTHERS = ("naive PyTorch with scores", "SDPA + separate scores", "naive PyTorch", "plain PyTorch", "SDPA")
OTHERS += ("FlexAttention", "ours, Triton", "ours, tiled PyTorch")


def digest(result: dict) -> str:
    """Return what tells one result from another."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def digest_in(picture: Path) -> str | None:
    """Return the digest of the result that a picture was drawn from; None where there is no such picture."""
    from PIL import Image

    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.text.get(KEY)


def origin(result: dict) -> str:
    """Say where a result comes from, in a picture's title."""
    about = result["provenance"]
    return f"{about['device']}, {about['date']}, torch {about['torch']}, triton {about['triton']}"


def draw(name: str, result: dict, path: Path) -> Path:
    """Draw a result as `path`; `name` is a command's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    PICTURES[name](figure, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={KEY: digest(result)})
    return path


def _operators(figure, result: dict) -> None:
    """Milliseconds against the sequence length, one line for each method."""
    axes = figure.subplots()
    rows = [row for row in result["rows"] if "ms" in row]
    names = [name for name in SHOWN if any(row["operator"] == name for row in rows)]
    _lines(axes, {name: [(r["n"], r["ms"]) for r in rows if r["operator"] == name] for name in names})
    axes.set(ylabel="milliseconds", title=f"Attention with scores and sums, causal, by method\n{origin(result)}")


def _memory(figure, result: dict) -> None:
    """Memory beyond inputs and results against the sequence length, with what N and N² look like."""
    panels = figure.subplots(1, 2, sharey=True)
    rows = [row for row in result["rows"] if "beyond_mb" in row]
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        of_pass = [row for row in rows if row.get("pass", "forward") == direction]
        lengths = sorted({row["n"] for row in of_pass})
        points = {}
        for row in of_pass:
            points.setdefault(row["operator"], []).append((row["n"], row["beyond_mb"]))
        _lines(axes, {name: xy for name, xy in points.items() if len(xy) > 1})  # sums: at one length only
        if of_pass and len(lengths) > 1:
            first = [row["beyond_mb"] for row in of_pass if row["n"] == lengths[0] and row["beyond_mb"] > 0]
            for label, power, style, start in (("N²", 2, "--", 2 * max(first)), ("N", 1, ":", min(first) / 2)):
                guide = [start * (n / lengths[0]) ** power for n in lengths]
                axes.plot(lengths, guide, style, color="grey", linewidth=1, label=f"grows with {label}")
            axes.legend(fontsize=8)
        axes.set(title="forward pass" if direction == "forward" else "forward and backward pass")
    panels[0].set(ylabel="MB at most, beyond inputs and results")
    figure.suptitle(f"Memory of causal attention\n{origin(result)}", fontsize=11)


def _flash(figure, result: dict) -> None:
    """End-to-end latency against the sequence length, a panel for each dtype, at the widest head."""
    rows = [row for row in result["rows"] if "end_to_end_ms" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows)) or ["nothing measured"]
    head_dim = max((row["head_dim"] for row in rows), default=0)
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        found = [row for row in rows if row["dtype"] == dtype and row["head_dim"] == head_dim]
        names = dict.fromkeys(row["method"] for row in found)
        _lines(axes, {name: [(r["n"], r["end_to_end_ms"]) for r in found if r["method"] == name] for name in names})
        axes.set(title=f"{dtype}, D = {head_dim}")
    panels[0].set(ylabel="milliseconds, as called from Python")
    figure.suptitle(f"Forward and backward pass of causal attention\n{origin(result)}", fontsize=11)


def _lines(axes, points: dict[str, list[tuple[float, float]]]) -> None:
    """Draw one line for each name on logarithmic axes."""
    for name, xy in points.items():
        axes.plot(
            *zip(*sorted(xy), strict=True), marker="o", markersize=4, label=name if name in OTHERS else f"{name} (ours)"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("sequence length N")
    axes.grid(alpha=0.3, which="both")
    if points:
        axes.legend(fontsize=8)


PICTURES = {"operators": _operators, "memory": _memory, "flash": _flash}
