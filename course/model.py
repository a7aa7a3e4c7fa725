"""The course's own language model: a byte-level Llama of about one million parameters, and a look inside its attention.

The weights lie next to the code in `tiny_model/`, trained by `python -m course.train_tiny_model`; a token is a byte.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging

MODEL_DIR = Path(__file__).parent / "tiny_model"
TEXT_DIR = Path(__file__).parent / "text"
BOOKS = ("alice", "paradise_lost")
HELD_OUT = 0.1  # share of each book that training never sees
CONTEXT = 512
LABELS = {ord(" "): "␣", ord("\n"): "⏎"}


class QKV(NamedTuple):
    """What one layer's attention is given: positions already rotated in, key and value heads not repeated."""

    q: Tensor  # [B, Hq, N, D]
    k: Tensor  # [B, Hk, N, D]
    v: Tensor  # [B, Hk, N, D]


def load_model(directory: Path = MODEL_DIR) -> LlamaForCausalLM:
    """Load the model from disk in float32 on the CPU, ready for evaluation; never touches the network."""
    bar_was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would outlast the split second that it measures, in every notebook
    try:
        return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    finally:
        if bar_was_shown:
            logging.enable_progress_bar()


def report(directory: Path = MODEL_DIR) -> dict[str, Any]:
    """Read what the training run measured: losses, per-head scores, and where and how long it ran."""
    return json.loads((directory / "report.json").read_text())


def encode(text: str) -> Tensor:
    """Turn text into its UTF-8 bytes, `[1, N]` int64."""
    return torch.tensor([list(text.encode())], dtype=torch.long)


def decode(token_ids: Tensor) -> str:
    """Turn the token ids of one sequence, `[N]` or `[1, N]`, back into text; bytes that are not UTF-8 become `�`."""
    return bytes(token_ids.flatten().tolist()).decode(errors="replace")


def token_labels(text: str) -> list[str]:
    """Name every byte of a text by something printable, for the axes of a heatmap."""
    return [LABELS.get(byte) or (chr(byte) if 33 <= byte <= 126 else f"{byte:02x}") for byte in text.encode()]


def read_books() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the books as bytes, `[N]` int64 each: what is trained on, and the last tenth of each, held out."""
    books = {name: torch.tensor(list((TEXT_DIR / f"{name}.txt").read_bytes())) for name in BOOKS}
    cuts = {name: round(len(book) * (1 - HELD_OUT)) for name, book in books.items()}
    return {n: book[: cuts[n]] for n, book in books.items()}, {n: book[cuts[n] :] for n, book in books.items()}


def windows(book: Tensor) -> Tensor:
    """Cut a book into full windows, `[W, CONTEXT + 1]`: every byte after the first is predicted exactly once."""
    return book.unfold(0, CONTEXT + 1, CONTEXT)


def held_out_windows() -> Tensor:
    """Return the windows of both held-out parts, `[W, CONTEXT + 1]`, in the order of `BOOKS`."""
    return torch.cat([windows(book) for book in read_books()[1].values()])


def _capture_then_sdpa(module, query, key, value, attention_mask, *, captured, **kwargs):
    captured.append(QKV(query, key, value))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("capture_qkv", _capture_then_sdpa)
AttentionMaskInterface.register("capture_qkv", sdpa_mask)


@torch.no_grad()
def capture_qkv(model: LlamaForCausalLM, input_ids: Tensor) -> list[QKV]:
    """Run the model once and return the queries, keys and values that each layer's attention was given.

    Args:
        model: any Llama of transformers; its attention implementation is put back afterwards.
        input_ids: [B, N] int64.

    Returns:
        One `QKV` per layer, first layer first.
    """
    captured: list[QKV] = []
    implementation = model.config._attn_implementation
    model.set_attn_implementation("capture_qkv")
    try:
        # Llama hands keywords that it does not know down to the attention function.
        model.model(input_ids, use_cache=False, captured=captured)
    finally:
        model.set_attn_implementation(implementation)
    return captured
