"""What the attention heads of a small language model do: previous-token heads and induction heads, by their scores."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from course.model import QKV, capture_qkv
from stage1_pytorch_tiled.dense import naive_attention

SEGMENT_LENGTHS = range(64, 129, 16)
PRINTABLE = range(32, 127)


class Head(NamedTuple):
    """A head, counted from zero, and its score."""

    layer: int
    head: int
    score: float


def attention_weights(qkv: QKV) -> Tensor:
    """Compute the causal softmax weights of one layer, densely.

    Args:
        qkv: q [B, Hq, N, D] and k [B, Hk, N, D], as `capture_qkv` returns them.

    Returns:
        [B, Hq, N, N] fp32 (fp64 for fp64 inputs); every row adds up to one.
    """
    return naive_attention(*qkv, causal=True).weights


def repeated_sequences(per_length: int = 8, seed: int = 0) -> list[Tensor]:
    """Draw random printable characters and write them twice.

    Only a model that looks back can know the second half: nothing in it can be learnt by heart.

    Args:
        per_length: sequences of each of `SEGMENT_LENGTHS`.
        seed: the same seed gives the same characters.

    Returns:
        One [per_length, 2·L] int64 tensor for each length L.
    """
    generator = torch.Generator().manual_seed(seed)
    bounds = PRINTABLE.start, PRINTABLE.stop
    return [torch.randint(*bounds, (per_length, n), generator=generator).repeat(1, 2) for n in SEGMENT_LENGTHS]


def previous_token_scores(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Measure each head's mean weight on the token just before its own, `[layers, Hq]`."""
    per_layer = [attention_weights(qkv).diagonal(-1, dim1=-2, dim2=-1) for qkv in capture_qkv(model, input_ids)]
    return torch.stack([weights.mean(dim=(0, 2)) for weights in per_layer])


def induction_scores(model: LlamaForCausalLM, sequences: list[Tensor]) -> Tensor:
    """Measure each head's mean weight, in the second half, on the token that followed the same token in the first.

    Args:
        model: any Llama of transformers.
        sequences: [B, 2·L] int64 each, a segment written twice, as `repeated_sequences` draws them.

    Returns:
        [layers, Hq], the mean over the given tensors.
    """
    return torch.stack([_induction_scores(model, input_ids) for input_ids in sequences]).mean(dim=0)


def _induction_scores(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    length = input_ids.shape[1] // 2
    scores = []
    for qkv in capture_qkv(model, input_ids):
        stripe = attention_weights(qkv).diagonal(1 - length, dim1=-2, dim2=-1)  # row i, column i - L + 1; i >= L - 1
        scores.append(stripe[..., 1:].mean(dim=(0, 2)))
    return torch.stack(scores)


def induction_chance(sequences: list[Tensor]) -> float:
    """Return the induction score of a head that looks at every visible token alike: the mean of 1 / (i + 1)."""
    lengths = [input_ids.shape[1] // 2 for input_ids in sequences]
    return sum(sum(1 / (i + 1) for i in range(n, 2 * n)) / n for n in lengths) / len(lengths)


def best_head(scores: Tensor) -> Head:
    """Find the head with the largest score of `[layers, Hq]`."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return Head(layer, head, float(scores[layer, head]))


@torch.no_grad()
def repeat_losses(model: LlamaForCausalLM, sequences: list[Tensor]) -> dict[str, float]:
    """Measure the mean loss, in nats per byte, on the first and on the second occurrence of each segment.

    The first token of either half is left out: nothing before it says what it will be.
    """
    first, second = [], []
    for input_ids in sequences:
        length = input_ids.shape[1] // 2
        losses = F.cross_entropy(model(input_ids).logits[:, :-1].mT, input_ids[:, 1:], reduction="none")  # [B, 2L - 1]
        first.append(losses[:, : length - 1].mean())
        second.append(losses[:, length:].mean())
    halves = {"first_occurrence": first, "second_occurrence": second}
    return {name: float(torch.stack(losses).mean()) for name, losses in halves.items()}


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens: Tensor, batch: int = 32) -> float:
    """Measure the mean loss over windows `[W, N + 1]` in nats per byte, in the weights' own precision."""
    losses = [
        F.cross_entropy(model(part[:, :-1]).logits.mT, part[:, 1:], reduction="none") for part in tokens.split(batch)
    ]
    return float(torch.cat(losses).mean())
