"""Train the course's language model: `python -m course.train_tiny_model`, under two minutes on one data-centre GPU.

A batch is partly text from two public-domain books, partly *repeated sequences*: a random segment written over and over
until the context is full. Those can only be predicted by looking back, which makes previous-token heads and induction
heads form, the heads that the course wants to show. The first part of training is mostly short repeats, because the
books are small: with half of every batch text, the model had learnt them by heart before the heads appeared.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import rich
import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from course import heads
from course.model import CONTEXT, HELD_OUT, MODEL_DIR, held_out_windows, load_model, read_books, windows
from course.provenance import provenance

TEXT_SHARES = {"alice": 0.35, "paradise_lost": 0.65}  # by size Alice would get a quarter
REPEATS_FIRST = 0.3  # share of training that is mostly repeats
TEXT_SHARE = (1 / 8, 1 / 2)  # of a batch, in that first part and after it
SHORTEST_SEGMENT = 8
LONGEST_SEGMENT = (32, 240)  # grows over the first part; at least two occurrences fit the context
FIRST_OCCURRENCE_WEIGHT = 0.1  # nothing to learn there but which characters occur
CHECKED_WINDOWS = 16

# Token ids are bytes, so no id is left for begin or end of text. RoPE's theta is Llama's default, 10000.
MODEL = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=CONTEXT,
    initializer_range=0.08,  # near 1 / √hidden; the usual 0.02 forms induction heads later
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def text_rows(batch: int, progress: float) -> int:
    """Return how many rows of a batch are text after a share `progress` of the training."""
    return max(1, round(batch * TEXT_SHARE[progress >= REPEATS_FIRST]))


class Batches:
    """Draws training batches on the device, from one seeded generator."""

    def __init__(self, books: dict[str, Tensor], batch: int, context: int, device: torch.device, seed: int):
        self.batch, self.context, self.device = batch, context, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.text = torch.cat(list(books.values())).to(device)
        self.sizes = torch.tensor([len(book) for book in books.values()], device=device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.shares = torch.tensor([TEXT_SHARES[name] for name in books], device=device)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def excerpts(self, rows: int, length: int) -> Tensor:
        """Draw windows of text, `[rows, length]`, each from one book."""
        book = torch.multinomial(self.shares, rows, replacement=True, generator=self.generator)
        first = self.starts[book] + (self.rand(rows) * (self.sizes[book] - length)).long()
        return self.text[first[:, None] + torch.arange(length, device=self.device)]

    def repeated(self, rows: int, length: int, longest: int) -> tuple[Tensor, Tensor]:
        """Draw sequences that repeat a random segment, `[rows, length]`, and the weight of each token in the loss."""
        characters = self.randint(heads.PRINTABLE.start, heads.PRINTABLE.stop, rows, longest)
        letters = self.randint(ord("a"), ord("z") + 1, rows, longest)
        words = torch.where(self.rand(rows, longest) < 0.2, ord(" "), letters)
        kinds = torch.stack([characters, words, self.excerpts(rows, longest)])  # [3, rows, longest]
        row = torch.arange(rows, device=self.device)
        segments = kinds[row % len(kinds), row]  # [rows, longest]
        segment_length = self.randint(SHORTEST_SEGMENT, longest + 1, rows, 1)
        offset = (self.rand(rows, 1) * segment_length).long()
        position = torch.arange(length, device=self.device)
        tokens = segments.gather(1, (position + offset) % segment_length)
        # The second occurrence's first token follows a token seen only once, so it is no more predictable.
        return tokens, torch.where(position > segment_length, 1.0, FIRST_OCCURRENCE_WEIGHT)

    def next(self, progress: float) -> tuple[Tensor, Tensor]:
        """Draw a batch: tokens `[batch, context + 1]` int64, and the loss weights of `tokens[:, 1:]`, text first.

        Args:
            progress: share of training that is done; decides how much text, and how long the repeated segments.
        """
        n_text = text_rows(self.batch, progress)
        longest = LONGEST_SEGMENT[0] + min(1, progress / REPEATS_FIRST) * (LONGEST_SEGMENT[1] - LONGEST_SEGMENT[0])
        text = self.excerpts(n_text, self.context + 1)
        repeated, weights = self.repeated(self.batch - n_text, self.context + 1, min(int(longest), self.context // 2))
        return torch.cat([text, repeated]), torch.cat([torch.ones_like(text, dtype=weights.dtype), weights])[:, 1:]


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: a linear warm-up, then a cosine down to a hundredth."""
    warm_up = max(1, min(200, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def compiled_or_eager(model: LlamaForCausalLM, batches: Batches) -> Callable:
    """Compile the model and try it on one batch; say so and return it as it is where that fails."""
    try:
        compiled = torch.compile(model)
        compiled(batches.next(0.0)[0][:, :-1], use_cache=False).logits.sum().backward()
    except Exception as error:
        rich.print(f"torch.compile failed, training goes on without it: {error}")
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    eval_every: int,
    compile_model: bool,
) -> list[dict[str, float]]:
    """Train the model in place and leave it with the weights of the smallest loss on held-out text plus repeats.

    Returns:
        One entry per evaluation: the step, the loss on the training batches' two halves, and on the held-out text.
    """
    device = batches.device
    held_out = held_out_windows().to(device)
    decay = {2: weight_decay, 1: 0.0}  # by the number of dimensions: matrices shrink, norm gains do not
    groups = [{"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": decay[n]} for n in decay]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    mixed = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with mixed:
        forward = compiled_or_eager(model, batches) if compile_model else model

    history, best, best_weights = [], float("inf"), {}
    with Progress(*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(1, steps + 1):
            tokens, weights = batches.next((step - 1) / steps)
            with mixed:
                logits = forward(tokens[:, :-1], use_cache=False).logits
            losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            losses = losses.view_as(weights)  # [batch, context]
            loss = (losses * weights).sum() / weights.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(task)
            if step % eval_every and step != steps:
                continue
            n_text = text_rows(len(tokens), (step - 1) / steps)
            entry = {
                "step": step,
                "text": losses[:n_text].mean().item(),
                "repeated": losses[n_text:][weights[n_text:] == 1].mean().item(),
                "held_out": heads.mean_loss(model, held_out),
            }
            history.append(entry)
            if entry["held_out"] + entry["repeated"] < best:
                best = entry["held_out"] + entry["repeated"]
                best_weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            progress.console.print("  ".join(f"{name} {value:.4g}" for name, value in entry.items()))
    model.load_state_dict(best_weights, strict=False)  # the tied output matrix has one name here, two there
    return history


def measure(model: LlamaForCausalLM) -> dict[str, Any]:
    """Measure everything that the report says about the weights, on the CPU, from the saved files."""
    train_books, held_out_books = read_books()
    held_out = held_out_windows()
    # As many training windows as held-out ones, spread evenly over each book.
    seen = torch.cat([windows(book)[:: round(1 / HELD_OUT) - 1] for book in train_books.values()])
    losses = {"train_loss": heads.mean_loss(model, seen), "validation_loss": heads.mean_loss(model, held_out)}
    sequences = heads.repeated_sequences()
    induction, chance = heads.induction_scores(model, sequences), heads.induction_chance(sequences)
    previous = heads.previous_token_scores(model, held_out[:CHECKED_WINDOWS, :-1])
    best = heads.best_head(induction)
    return {
        "parameters": model.num_parameters(),
        **losses,
        **{f"{name}_bits_per_byte": loss / math.log(2) for name, loss in losses.items()},
        "validation_loss_by_book": {
            name: heads.mean_loss(model, windows(book)) for name, book in held_out_books.items()
        },
        f"validation_loss_first_{CHECKED_WINDOWS}_windows": heads.mean_loss(model, held_out[:CHECKED_WINDOWS]),
        "repeat_loss": heads.repeat_losses(model, sequences),
        "best_induction_head": best._asdict() | {"chance": chance, "ratio": best.score / chance},
        "best_previous_token_head": heads.best_head(previous)._asdict(),
        "induction_chance": chance,
        "induction": induction.tolist(),
        "previous_token": previous.tolist(),
    }


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 64,
    context: Annotated[int, typer.Option(help="Bytes in a training sequence.")] = CONTEXT,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Of the matrices; norm gains have none.")] = 0.5,
    eval_every: Annotated[int, typer.Option(help="Steps between two looks at the held-out text.")] = 100,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    seed: Annotated[int, typer.Option(help="Seeds the weights and the batches.")] = 0,
    compile_model: Annotated[bool, typer.Option("--compile", help="Train through torch.compile.")] = False,
    out: Annotated[Path, typer.Option(help="Where weights, configuration and report go.")] = MODEL_DIR,
) -> None:
    """Train the tiny model on the course's two books, keep the best checkpoint, and measure its heads."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(MODEL).to(device)
    batches = Batches(read_books()[0], batch, context, torch.device(device), seed)
    started = time.perf_counter()
    history = train(model, batches, steps, learning_rate, weight_decay, eval_every, compile_model)
    seconds = time.perf_counter() - started
    model.save_pretrained(out)
    tokens = steps * batch * context
    run = provenance() | {
        "seed": seed,
        "steps": steps,
        "best_step": min(history, key=lambda entry: entry["held_out"] + entry["repeated"])["step"],
        "batch": batch,
        "context": context,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "tokens": tokens,
        "wall_seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    report = run | measure(load_model(out)) | {"history": history}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    shown = ("validation_loss", "validation_loss_bits_per_byte", "repeat_loss", "best_induction_head")
    rich.print({key: report[key] for key in (*shown, "best_previous_token_head", "tokens_per_second")})


if __name__ == "__main__":
    typer.run(main)
