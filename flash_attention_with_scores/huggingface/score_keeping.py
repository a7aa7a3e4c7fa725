"""Cache layers that keep the attention their keys have had.

What the attention function asks of the cache layer of a self-attention, in this order. `ScoreKeeping` has all but
`visible_keys` and `after_attention`, which a layer of another kind (one that evicts) may add:

1. `update(keys, values, ...)`: transformers' own method; returns the keys that the new queries attend to.
2. `span(width) -> (n_k, offset)`: of the `width` keys that `update` returned the first n_k are written, and key j is
   column offset + j of the kept scores.
3. `visible_keys(new) -> mask`: new is [B, n_q] bool, False for new tokens that are padding, or None where none is.
   Returns [B, n_k] or [B, Hk, n_k] bool, True for keys that may be seen, or None where all may. The last n_q keys must
   be the new tokens; causal order among these is the attention function's business, and all other keys are older. A
   layer with this method is not given transformers' mask, nor a sliding window.
4. `wanted_queries(n_q) -> (begin, stop) | None`: whose attention to sum; None for no sums (and no cost).
5. `add_scores(sums, offset)`: sums is [B, Hk, n_k] fp32, over the head group and the wanted queries, padding left out.
6. `after_attention(query, n_q)`: query is [B, Hq, n_q, D], positions encoded. Here a layer may evict.

`score_store` is what `get_all_cumulative_scores` holds and reads, so that scores outlive the cache but its keys do not.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # what the mixin is mixed into
    from transformers.cache_utils import DynamicLayer as _CacheLayer
else:
    _CacheLayer = object


class ScoreStore:
    """Scores [B, Hk, N] fp32 of a cache layer (None at first), the tokens it has seen, and the path of its module."""

    def __init__(self, seen: int = 0):
        self.scores: Tensor | None = None
        self.seen = seen
        self.path: str | None = None

    def add(self, sums: Tensor, offset: int = 0) -> None:
        """Add sums [B, Hk, n] to the columns from offset on; columns that are new start at 0."""
        sums = sums.float()
        if self.scores is None:
            self.scores = sums.new_zeros(*sums.shape[:2], offset)
        if self.scores.shape[:2] != sums.shape[:2]:
            raise ValueError(
                f"the kept scores are of batch size and KV heads {list(self.scores.shape[:2])}, the new ones of "
                f"{list(sums.shape[:2])}: call reset_cumulative_scores(model) or use a fresh cache"
            )
        grown = torch.nn.functional.pad(self.scores, (0, offset + sums.shape[2] - self.scores.shape[2]))
        grown[..., offset:].add_(sums)
        self.scores = grown

    def change(self, function) -> None:
        """Replace the scores by function(scores), if there are any."""
        if self.scores is not None:
            self.scores = function(self.scores)

    def clear(self) -> None:
        """Forget the scores; what the layer has seen it has seen."""
        self.scores = None


class ScoreKeeping(_CacheLayer):
    """Mixin for transformers' cache layers; column j of the scores is token j of the sequence.

    A sliding layer drops keys but keeps their scores. `crop` drops the scores of the tokens that go; what these had
    given to the others while they were there remains.
    """

    _layer_type = None  # else transformers would register subclasses in place of the stock layer

    @property
    def score_store(self) -> ScoreStore:
        if "_score_store" not in self.__dict__:
            self._score_store = ScoreStore()
        return self._score_store

    def update(self, key_states, value_states, *args, **kwargs):
        self.score_store.seen += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def span(self, width: int) -> tuple[int, int]:
        seen = int(self.get_seq_length()) if self.is_sliding else self.score_store.seen
        if self.is_sliding or hasattr(self, "max_cache_len"):
            return min(width, seen), max(seen - width, 0)
        return width, 0

    def wanted_queries(self, n_q: int) -> tuple[int, int] | None:
        return 0, n_q

    def add_scores(self, sums: Tensor, offset: int) -> None:
        n_tokens = offset + sums.shape[2]
        if n_tokens != self.score_store.seen:
            raise ValueError(
                f"the cache layer was given {self.score_store.seen} tokens but holds {n_tokens}: keys were dropped "
                "behind its back, so scores cannot be kept; let a module_filter of replace_attention_with_flash say so"
            )
        self.score_store.add(sums, offset)

    def reset(self) -> None:
        super().reset()
        self.score_store.clear()
        self.score_store.seen = int(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.score_store.change(lambda scores: scores.index_select(0, beam_idx.to(scores.device)))

    def crop(self, *args, **kwargs) -> None:
        super().crop(*args, **kwargs)
        self.score_store.seen = length = int(self.get_seq_length())
        self.score_store.change(lambda scores: scores[..., :length])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.score_store.change(lambda scores: scores.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.score_store.change(lambda scores: scores[indices])

    def __reduce__(self):
        bases = [base for base in type(self).__bases__ if base is not ScoreKeeping]
        made = type(self) in _SUBCLASSES.values()
        return _rebuild, (bases[0] if made else type(self), made, self.__dict__)


_SUBCLASSES: dict[type, type] = {}


def keep_scores(layers: list, index: int):
    """Put a score-keeping layer in a stock layer's place, with the same contents, and return it."""
    stock = layers[index]
    if not isinstance(stock, ScoreKeeping):
        layers[index] = _rebuild(type(stock), True, stock.__dict__)
        layers[index]._score_store = ScoreStore(seen=int(stock.get_seq_length()))
    return layers[index]


def _subclass(stock: type) -> type:
    if stock not in _SUBCLASSES:
        _SUBCLASSES[stock] = type(f"ScoreKeeping{stock.__name__}", (ScoreKeeping, stock), {})
    return _SUBCLASSES[stock]


def _rebuild(stock: type, made: bool, state: dict):
    cls = _subclass(stock) if made else stock
    layer = object.__new__(cls)
    layer.__dict__ = state
    return layer
