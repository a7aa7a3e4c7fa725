"""Masks between transformers and the kernels, which know causal order, a window and key masks, but no M×N masks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_HINT = "attention with scores knows causal order, sliding windows and padding only"


class Sight(NamedTuple):
    """What queries see, in the kernels' terms."""

    causal: bool
    window: tuple[int, int | None] | None = None
    key_mask: Tensor | None = None  # [B, N] or [B, Hk, N] bool


def make_mask(
    batch_size, kv_length, mask_function=causal_mask_function, attention_mask=None, *,
    q_length: Any = None, q_offset=0, kv_offset=0, cache_position=None, allow_is_causal_skip=True, **kwargs,
) -> Tensor | None:  # fmt: skip
    """Describe what is visible to one kind of layer; transformers calls this once for each kind and forward pass.

    Returns:
        [B, n] bool, the keys that are no padding, for several queries in causal order, with a window or not (the layer
        tells its window itself); None where nothing is masked beside; else what transformers makes for SDPA.
    """
    sizes = {"q_length": q_length, "q_offset": q_offset}
    if cache_position is not None and q_length is None:  # up to 5.2
        sizes = {"cache_position": cache_position}
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    if q_length > 1 and _is_causal(mask_function):
        written = min(kv_length, int(q_offset) + q_length - kv_offset)
        if attention_mask is None:
            real = None if written == kv_length else torch.ones(batch_size, written, dtype=torch.bool)
        else:
            real = attention_mask[:, kv_offset : kv_offset + written].bool()
            real = torch.nn.functional.pad(real, (0, written - real.shape[1]))
            real = None if written == kv_length and real.all() else real
        return real if real is None or "device" not in kwargs else real.to(kwargs["device"])
    if mask_function.__name__ == "bidirectional_mask_function":  # never None, which means causal for most modules
        device = kwargs.get("device") if attention_mask is None else attention_mask.device
        real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        if attention_mask is not None:
            real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        return real[:, None, None].expand(-1, -1, q_length, -1)
    return sdpa_mask(
        batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip and q_length == 1, **sizes, **kwargs,
    )  # fmt: skip


def _is_causal(mask_function) -> bool:
    """Tell whether this is causal order, alone or within a sliding window; no for what is not known by sight."""
    if mask_function is causal_mask_function:
        return True
    if mask_function.__qualname__ != "and_masks.<locals>.and_mask":
        return False
    parts = next(cell.cell_contents for cell in mask_function.__closure__ if isinstance(cell.cell_contents, tuple))
    windows = [part for part in parts if part.__qualname__ == "sliding_window_overlay.<locals>.inner_mask"]
    return len(parts) == 2 and len(windows) == 1 and causal_mask_function in parts


def new_tokens(mask: Tensor | None, n_q: int) -> Tensor | None:
    """Return [B, n_q] bool, False for new tokens that are padding, or None where none is."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, -n_q:]
    if n_q > 1:
        raise ValueError(f"a mask of shape {list(mask.shape)} does not go with a cache that evicts; {_HINT}")
    return _visible(mask)[:, 0, 0, -1:]


def read_mask(mask: Tensor | None, n_q: int, n_k: int, width: int, causal: bool, sliding_window: int | None) -> Sight:
    """Say in the kernels' terms what a mask lets queries see.

    Args:
        mask: [B, n_k] bool from `make_mask`, [B, 1 or H, n_q, width or n_k] bool or additive, or None.
        n_q, n_k: queries, and keys that are written.
        width: keys that there is room for, n_k of which are written.
        causal: whether the layer is causal where no mask says otherwise.
        sliding_window: how many keys a query sees, itself included, or None; a 4-D mask has it already.

    Raises:
        ValueError: the kernels cannot express it; the message says why.
    """
    window = (sliding_window - 1, 0) if sliding_window is not None and causal else None
    if mask is None:
        return Sight(causal, window)
    if mask.ndim == 2:
        if mask.shape[1] != n_k:
            raise ValueError(f"the mask is for {mask.shape[1]} keys, but there are {n_k}")
        return Sight(True, (sliding_window - 1, 0) if sliding_window is not None else None, mask)
    if mask.shape[3] not in (width, n_k):
        raise ValueError(f"the mask is for {mask.shape[3]} keys, but there are {width}")
    visible = _visible(mask)[:, 0, :, :n_k]
    if n_q == 1:
        return Sight(causal, None, visible[:, 0])
    if visible.stride(1) == 0 or torch.equal(visible, visible[:, :1].expand_as(visible)):
        return Sight(False, None, visible[:, 0])
    key_mask = visible.any(1)
    behind = torch.arange(n_q, device=mask.device)[:, None] + (n_k - n_q) - torch.arange(n_k, device=mask.device)
    sees = visible.any(2)
    own = torch.arange(n_q, device=mask.device) + (n_k - n_q)
    left = (own - visible.byte().argmax(2))[sees].amax().clamp(min=0)
    right = (n_k - 1 - visible.flip(2).byte().argmax(2) - own)[sees].amax().clamp(min=0)
    if torch.equal(visible, (behind <= left) & (behind >= -right) & key_mask[:, None]):
        return Sight(int(right) == 0, (int(left), int(right)), key_mask)
    raise ValueError(
        f"a mask of shape {list(mask.shape)} is neither that of causal order and padding nor the same for all queries "
        f"(packed sequences, chunks, prefixes, images?); {_HINT}"
    )


def _visible(mask: Tensor) -> Tensor:
    """Return [B, 1, n_q, n] bool of a 4-D mask, which must neither be a bias nor differ between heads."""
    if mask.shape[1] > 1:
        if not torch.equal(mask, mask[:, :1].expand_as(mask)):
            raise ValueError(f"a mask of shape {list(mask.shape)} differs between heads; {_HINT}")
        mask = mask[:, :1]
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not (visible | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ValueError(f"a mask of shape {list(mask.shape)} adds a bias to the scores; {_HINT}")
    return visible
