"""What eviction costs the course's tiny model: three tasks, every policy, caches from all of the context to 6 % of it.

`python -m course.eviction_experiment` writes `benchmark/results/eviction.json` and draws it. A context is read in one
pass, the cache evicts down to its budget and stays there, and what follows is fed in short passes: the model is told
the truth and asked for the next byte each time. The tasks:

- copy: random characters, written twice, with the first writing as the context. Every byte of it is needed once.
- retrieval: random characters, in whose first half a few stand three times; then these come once more. Few bytes are
  needed, long ago, and the attention of the later occurrences has told which.
- text: the last part of a held-out window, with the first part as the context. Only the loss tells.
"""

import copy
import json
import statistics
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import rich
import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from transformers import LlamaForCausalLM

from course.heads import PRINTABLE
from course.model import CONTEXT, held_out_windows, load_model
from course.provenance import provenance
from flash_attention_with_scores.eviction import (
    CAB,
    H2O,
    EvictingCache,
    EvictingLayer,
    Full,
    Policy,
    Random,
    SnapKV,
    StreamingLLM,
)
from flash_attention_with_scores.huggingface import replace_attention_with_flash

RECORD = Path(__file__).parent.parent / "benchmark" / "results" / "eviction.json"
PICTURE = Path(__file__).parent / "pictures" / "eviction.png"
BUDGETS = (1.0, 0.5, 0.25, 0.12, 0.06)  # of the context
ONE_PASS = "H2O, one-pass sums"
POLICIES: dict[str, Callable[[int], Policy]] = {  # by name, from a seed
    "H2O": lambda seed: H2O(),
    ONE_PASS: lambda seed: H2O(),
    "CAB": lambda seed: CAB(),
    "SnapKV": lambda seed: SnapKV(window=8),
    "StreamingLLM": lambda seed: StreamingLLM(),
    "random": lambda seed: Random(seed),
}
PASS = 8  # bytes that are fed at once
SEGMENT = 200  # characters to copy
HAYSTACK, NEEDLE, OCCURRENCES = 340, 24, 3  # characters in all, to retrieve, and how often these stand there
LEAD_IN = 4  # characters of the needle that it takes to know where to look
TEXT = 384  # bytes of context


class Sequences(NamedTuple):
    """One task's input."""

    ids: Tensor  # [B, N] int64
    n_context: int  # read in one pass, then evicted from
    n_free: int  # predictions after it that do not count


def copies(batch: int, seed: int) -> Sequences:
    """Draw random characters and write them twice; the second writing's first one cannot be known."""
    return Sequences(_characters(batch, SEGMENT, _generator(seed)).repeat(1, 2), SEGMENT, 1)


def needles(batch: int, seed: int) -> Sequences:
    """Put the same random characters into the first half of others several times, anywhere, and once behind them."""
    generator = _generator(seed)
    needles = _characters(batch, NEEDLE, generator)
    hay = _characters(batch, HAYSTACK - OCCURRENCES * NEEDLE, generator)
    n_places = HAYSTACK // 2 - OCCURRENCES * NEEDLE + 1
    rows = []
    for straws, needle in zip(hay, needles, strict=True):
        places = torch.randperm(n_places, generator=generator)[:OCCURRENCES].sort().values
        first, *others = straws.tensor_split(places)
        rows.append(torch.cat([first, *(torch.cat([needle, part]) for part in others), needle]))
    return Sequences(torch.stack(rows), HAYSTACK, LEAD_IN)


def texts(batch: int, seed: int) -> Sequences:
    """Draw windows of held-out text."""
    windows = held_out_windows()
    chosen = torch.randperm(len(windows), generator=_generator(seed))[:batch]
    return Sequences(windows[chosen, :CONTEXT], TEXT, 0)


TASKS = {"copy": copies, "retrieval": needles, "text": texts}
PANELS = {  # the quantity, what the task is, the axis
    "copy": ("accuracy", f"copy {SEGMENT} random characters", "share of bytes predicted right"),
    "retrieval": ("accuracy", f"retrieve {NEEDLE} of {HAYSTACK} random characters", "share of bytes predicted right"),
    "text": ("extra loss", f"go on with a text after {TEXT} bytes", "extra loss, nats per byte"),
}
QUIET = "#8a8a8a"
STYLES = {
    "H2O": {"color": "#0072B2", "marker": "o"},
    ONE_PASS: {"color": "#0072B2", "marker": "o", "mfc": "white", "ls": "--"},
    "CAB": {"color": "#009E73", "marker": "s"},
    "SnapKV": {"color": "#D55E00", "marker": "^"},
    "StreamingLLM": {"color": "#AA4499", "marker": "D"},
    "random": {"color": "#8a8a8a", "marker": "x"},
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _characters(batch: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(PRINTABLE.start, PRINTABLE.stop, (batch, length), generator=generator)


class OnePassLayer(EvictingLayer):
    """A deliberately wrong layer: it sums what a kernel has in its hands when it visits a tile for the first time.

    That is exp(s − m) with the maximum of the tiles visited so far, and without the row's normaliser, which is known
    only after the last tile. Rows that attend to many keys count too much, and so do keys that come before the maximum.
    """

    tile = 128  # keys

    def wanted_queries(self, n_q: int) -> None:
        return None

    def after_attention(self, query: Tensor, n_q: int) -> None:
        self.score_store.add(one_pass_sums(query, self.keys, self.tile))
        super().after_attention(query, n_q)


def one_pass_sums(q: Tensor, k: Tensor, tile: int) -> Tensor:
    """Sum exp(s − running maximum) over the queries, causally; the maximum runs over tiles of keys.

    Args:
        q: [B, Hq, M, D], the last queries.
        k: [B, Hk, N, D].
        tile: keys in a tile.

    Returns:
        [B, Hk, N] fp32.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    logits = q.unflatten(1, (k.shape[1], -1)).float() @ k.float()[:, :, None].mT * q.shape[3] ** -0.5
    number = torch.arange(n_k, device=q.device)
    logits = logits.masked_fill(number > number[n_k - n_q :, None], -torch.inf)  # [B, Hk, G, M, N]
    tiles = F.pad(logits, (0, -n_k % tile), value=-torch.inf).unflatten(-1, (-1, tile))
    running_max = tiles.amax(-1).cummax(-1).values[..., None]
    return (tiles - running_max).exp().flatten(-2)[..., :n_k].sum((2, 3))


def make_cache(model: LlamaForCausalLM, name: str, policy: Policy) -> EvictingCache:
    """Return a cache that keeps everything until its budget is set; the name tells what scores it keeps."""
    cache = EvictingCache(model, policy, 1.0)
    if name == ONE_PASS:
        cache.layers = [OnePassLayer(policy) for _ in cache.layers]
    return cache


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, task: str, name: str, policy: Policy, budgets: tuple[float, ...], batch: int, seed: int
) -> list[dict[str, Any]]:
    """Run one policy on one task: read the context once, and from there on once with every budget.

    Returns:
        A row for each budget: what was run, the budget in `tokens`, the `accuracy` of the predictions that count, and
        their `loss` in nats per byte.
    """
    ids, n_context, n_free = TASKS[task](batch, seed)
    full = make_cache(model, name, policy)
    first = model(ids[:, :n_context], past_key_values=full).logits[:, -1:]
    truth = ids[:, n_context + n_free :]
    rows = []
    for share in budgets:
        cache = copy.deepcopy(full)
        tokens = round(share * n_context)
        cache.set_budget(tokens)
        logits = [first]
        for part in ids[:, n_context:-1].split(PASS, dim=1):
            logits.append(model(part, past_key_values=cache).logits)
        counted = torch.cat(logits, dim=1)[:, n_free:]  # [B, n, 256]
        about = {"task": task, "policy": name, "budget": share, "tokens": tokens, "seed": seed}
        accuracy = (counted.argmax(-1) == truth).float().mean().item()
        loss = F.cross_entropy(counted.flatten(0, 1), truth.flatten()).item()
        rows.append(about | {"accuracy": accuracy, "loss": loss})
    return rows


def measure_all(
    seeds: int = 5,
    batch: int = 16,
    budgets: tuple[float, ...] = BUDGETS,
    tasks: tuple[str, ...] = tuple(TASKS),
    policies: dict[str, Callable[[int], Policy]] = POLICIES,
) -> list[dict[str, Any]]:
    """Measure every policy on every task, with every budget and seed; with all of the context there is only "full"."""
    model = replace_attention_with_flash(load_model())
    runs = [(task, name, seed) for task in tasks for name in ("full", *policies) for seed in range(seeds)]
    rows = []
    for task, name, seed in track(runs, "evicting", transient=True):
        policy = policies[name](seed) if name in policies else Full()
        shares = tuple(share for share in budgets if (share == 1) == (name == "full"))
        rows += measure(model, task, name, policy, shares, batch, seed)
    return rows


def summary(rows: list[dict[str, Any]], task: str, quantity: str) -> dict[str, dict[float, tuple[float, float]]]:
    """Return, of each policy and budget, the mean over the seeds and their standard deviation (0 for one seed).

    Args:
        rows: from `measure_all`.
        task: one of `TASKS`.
        quantity: "accuracy", "loss", or "extra loss": beyond that of the full cache on the same sequences, which leaves
            out how hard these are.
    """
    of_task = [row for row in rows if row["task"] == task]
    full = {row["seed"]: row["loss"] for row in of_task if row["policy"] == "full"}
    found: dict[str, dict[float, list[float]]] = {}
    for row in of_task:
        value = row["loss"] - full[row["seed"]] if quantity == "extra loss" else row[quantity]
        found.setdefault(row["policy"], {}).setdefault(row["budget"], []).append(value)
    return {
        name: {share: (statistics.mean(x), statistics.stdev(x) if len(x) > 1 else 0.0) for share, x in each.items()}
        for name, each in found.items()
    }


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw a panel for each task: what is left of the model's ability, against the budget."""
    shown = {task: PANELS[task] for task in PANELS if any(row["task"] == task for row in rows)}
    fig = Figure(figsize=(4.3 * len(shown), 4.4), dpi=110, layout="constrained")
    panels = fig.subplots(1, len(shown), squeeze=False)[0]
    for ax, (task, (quantity, title, label)) in zip(panels, shown.items(), strict=True):
        found = summary(rows, task, quantity)
        full = found.pop("full")[1.0]
        shares = sorted({share for each in found.values() for share in each} | {1.0})
        ax.axhline(full[0], color=QUIET, lw=0.8, ls=":")
        for number, (name, each) in enumerate(found.items()):
            points = each | {1.0: full}
            x = [shares.index(share) for share in sorted(points)]
            mean, deviation = zip(*(points[share] for share in sorted(points)), strict=True)
            style = STYLES.get(name, {"color": QUIET, "marker": "*"})
            shift = 0.03 * (number - (len(found) - 1) / 2)  # error bars beside each other
            x = [i if shares[i] == 1 else i + shift for i in x]
            ax.errorbar(x, mean, deviation, label=name, ms=5, lw=1.4, elinewidth=0.9, capsize=2, **style)
        ax.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        ax.set(xlabel="cache budget, share of the context", ylabel=label)
        ax.set_title(title, loc="left", size=9.5)
        if quantity == "accuracy":
            ax.set_ylim(-0.02, 1.04)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(QUIET)
        ax.tick_params(length=2.5, color=QUIET, labelsize=8.5)
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return fig


def main(
    seeds: Annotated[int, typer.Option(help="Runs with sequences of their own; the error bars.")] = 5,
    batch: Annotated[int, typer.Option(help="Sequences in a run.")] = 16,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Another policy to measure, as module:name; it is called without arguments."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where record and picture go, if not to the repository.")] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="Only draw what is recorded.")] = False,
) -> None:
    """Measure what each policy leaves of the tiny model's abilities; keep and draw it."""
    record, picture = (RECORD, PICTURE) if out is None else (out / RECORD.name, out / PICTURE.name)
    record.parent.mkdir(parents=True, exist_ok=True)
    if not redraw:
        torch.set_num_threads(1)  # faster on matrices as small as these
        policies = dict(POLICIES)
        for path in policy or []:
            module, _, name = path.partition(":")
            make = getattr(import_module(module), name)
            policies[name] = lambda seed, make=make: make()
        rows = measure_all(seeds, batch, policies=policies)
        about = provenance() | {"seeds": seeds, "batch": batch, "pass": PASS, "dtype": "float32"}
        about["device"] = f"CPU, {torch.get_num_threads()} thread"
        record.write_text(json.dumps({"provenance": about, "rows": rows}, indent=1) + "\n")
    recorded = json.loads(record.read_text())
    for task, (quantity, *_) in PANELS.items():
        means = summary(recorded["rows"], task, quantity)
        rich.print({task: {name: {s: round(x[0], 3) for s, x in each.items()} for name, each in means.items()}})
    draw(recorded["rows"]).savefig(picture)


if __name__ == "__main__":
    typer.run(main)
