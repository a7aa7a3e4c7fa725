"""A cache for transformers' models that keeps no more keys than its budget, and the policies that choose them.

The cache is imported when it is first asked for, since it needs transformers; the policies need torch alone.
"""

import importlib
from typing import TYPE_CHECKING

from .policies import CAB, H2O, PADDING, Full, Policy, Random, SnapKV, StreamingLLM

if TYPE_CHECKING:
    from .cache import Budget, Budgets, EvictingCache, EvictingLayer

__all__ = [
    "CAB",
    "H2O",
    "PADDING",
    "Budget",
    "Budgets",
    "EvictingCache",
    "EvictingLayer",
    "Full",
    "Policy",
    "Random",
    "SnapKV",
    "StreamingLLM",
]
_OF_CACHE = ("Budget", "Budgets", "EvictingCache", "EvictingLayer")


def __getattr__(name: str):
    if name not in _OF_CACHE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".cache", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_CACHE})
