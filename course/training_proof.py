"""Train the same tiny model with PyTorch's attention and with the library's, and compare the losses step by step.

`python -m course.training_proof` writes the losses to `benchmark/results/training.json` (`training_cuda.json` on a GPU)
and draws them. Seed, weights and batches are the same in every run, so that attention is the only difference. Two more
runs say what a difference means: transformers' plain formula, which strays by rounding alone, and the library's
attention with one mistake in its gradients, which training has to feel.
"""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import rich
import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from rich.progress import track
from transformers import AttentionInterface, LlamaForCausalLM

from course.model import read_books
from course.provenance import provenance
from course.train_tiny_model import MODEL, Batches, learning_rate_factor
from flash_attention_with_scores import attention

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
PICTURE = Path(__file__).parent / "pictures" / "training_proof.png"
RECORDS = {"cpu": "training.json", "cuda": "training_cuda.json"}  # by the device's type
RUNS = {  # transformers' names
    "sdpa": "sdpa",
    "plain": "eager",
    "ours": "course_attention",
    "without_grad_k": "course_attention_without_grad_k",
}
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 24}
QUIET, BLUE, ORANGE, PURPLE = "#8a8a8a", "#0072B2", "#D55E00", "#AA4499"


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention as transformers asks for it."""
    if attention_mask is not None:
        raise ValueError("the training proof has no padding, so there should be no mask")
    output = attention(query, key, value, causal=True, sm_scale=scaling, dropout_p=dropout)
    return output.transpose(1, 2).contiguous(), None


def _attend_without_grad_k(module, query, key, *args, **kwargs):
    """The mistake: no gradient of the keys."""
    return _attend(module, query, key.detach(), *args, **kwargs)


AttentionInterface.register(RUNS["ours"], _attend)
AttentionInterface.register(RUNS["without_grad_k"], _attend_without_grad_k)


def losses(
    implementation: str, steps: int, batch: int = 16, context: int = 128, device: str = "cpu", seed: int = 0
) -> list[float]:
    """Train a new model and return the loss of every step.

    Args:
        implementation: a name that transformers knows, such as those of `RUNS`.
        steps: optimizer steps.
        batch, context: sequences in a batch, bytes in a sequence.
        device: "cpu" trains in float32, "cuda" under autocast to bf16.
        seed: the same seed gives the same weights and the same batches.
    """
    config = copy.deepcopy(MODEL)
    config.update(SIZES)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(device)
    model.set_attn_implementation(implementation)
    batches = Batches(read_books()[0], batch, context, torch.device(device), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    mixed = torch.autocast("cuda", torch.bfloat16) if torch.device(device).type == "cuda" else nullcontext()
    history = []
    for step in track(range(steps), f"training with {implementation}", transient=True):
        tokens, weights = batches.next(step / steps)
        with mixed:
            logits = model(tokens[:, :-1], use_cache=False).logits
        each = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (each.view_as(weights) * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(loss.detach())
    return torch.stack(history).tolist()


def compare_runs(steps: int, **kwargs) -> list[dict[str, float]]:
    """Train once with each implementation of `RUNS`; the other arguments are those of `losses`.

    Returns:
        One row per step: {"step": 1, "sdpa": loss, …} with a loss for every run.
    """
    runs = {name: losses(implementation, steps, **kwargs) for name, implementation in RUNS.items()}
    return [
        {"step": step} | dict(zip(runs, at_step, strict=True))
        for step, at_step in enumerate(zip(*runs.values(), strict=True), 1)
    ]


def largest_difference(rows: list[dict[str, float]], name: str = "ours") -> float:
    """Return the largest difference of a run's loss from the one with PyTorch's attention, over all steps."""
    return max(abs(row[name] - row["sdpa"]) for row in rows)


def recorded(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Read the records that are there: {"cpu": {"provenance": …, "rows": …}, "cuda": …}."""
    found = {device: folder / name for device, name in RECORDS.items()}
    return {device: json.loads(path.read_text()) for device, path in found.items() if path.exists()}


def draw(records: dict[str, dict[str, Any]]) -> Figure:
    """Draw the losses of every record, and below them how far the runs lie apart."""
    fig = Figure(figsize=(6.4 * len(records), 5.4), dpi=110, layout="constrained")
    axes = fig.subplots(2, len(records), squeeze=False, sharex="col", height_ratios=[1.5, 1])
    for (top, bottom), record in zip(axes.T, records.values(), strict=True):
        rows, about = record["rows"], record["provenance"]
        steps = [row["step"] for row in rows]
        top.plot(
            steps, [row["without_grad_k"] for row in rows], color=PURPLE, lw=0.9, label="a mistake: no gradient of k"
        )
        top.plot(steps, [row["sdpa"] for row in rows], color=BLUE, lw=4, alpha=0.35, label="PyTorch's attention")
        top.plot(steps, [row["ours"] for row in rows], color=ORANGE, lw=1, label="the library's")
        top.set(ylabel="loss, nats per byte")
        top.set_title(f"{about['device']}, {about['dtype']}, {about['date']}", loc="left", size=9.5)
        top.legend(frameon=False, fontsize=9)
        named = {
            "without_grad_k": (PURPLE, "no gradient of k"),
            "plain": (QUIET, "the plain formula"),
            "ours": (ORANGE, "the library"),
        }
        for name, (color, label) in named.items():
            apart = [abs(row[name] - row["sdpa"]) for row in rows]
            widest = f"{label}, at most {largest_difference(rows, name):.1e}"
            bottom.plot(steps, apart, ".", color=color, ms=3, label=widest)
        bottom.set_yscale("log")
        bottom.set(xlabel="step", ylabel="|loss − PyTorch's|")
        note = {"title": "equal losses are not drawn", "title_fontsize": 8.5}
        bottom.legend(loc="lower right", framealpha=0.9, edgecolor="none", fontsize=9, markerscale=3, **note)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(QUIET)
        ax.tick_params(length=2.5, color=QUIET, labelsize=8.5)
    return fig


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 400,
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 16,
    context: Annotated[int, typer.Option(help="Bytes in a sequence.")] = 128,
    device: Annotated[str, typer.Option(help="cpu (float32) or cuda (bf16).")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seeds the weights and the batches.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where record and picture go, if not to the repository.")] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="Only draw what is recorded.")] = False,
) -> None:
    """Train the tiny model with PyTorch's attention and with the library's; keep and draw the losses."""
    folder, picture = (RESULTS, PICTURE) if out is None else (out, out / PICTURE.name)
    folder.mkdir(parents=True, exist_ok=True)
    if not redraw:
        torch.set_num_threads(1)
        rows = compare_runs(steps, batch=batch, context=context, device=device, seed=seed)
        about = provenance() | {"steps": steps, "batch": batch, "context": context, "seed": seed}
        kind = torch.device(device).type
        about["dtype"] = {"cpu": "float32", "cuda": "bf16"}[kind]
        if kind == "cpu":
            about["device"] = f"CPU, {torch.get_num_threads()} thread"
        (folder / RECORDS[kind]).write_text(json.dumps({"provenance": about, "rows": rows}, indent=1) + "\n")
        rich.print({name: f"largest difference {largest_difference(rows, name):.2g}" for name in RUNS})
        rich.print({"first": rows[0], "last": rows[-1]})
    draw(recorded(folder)).savefig(picture)


if __name__ == "__main__":
    typer.run(main)
