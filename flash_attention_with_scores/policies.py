"""The policies under the name by which they can be imported as well; they are in `eviction/policies.py`."""

from .eviction.policies import (
    CAB,
    H2O,
    PADDING,
    Full,
    Policy,
    Random,
    SnapKV,
    StreamingLLM,
    largest,
    most_recent,
    part,
    union,
)

__all__ = [
    "CAB",
    "H2O",
    "PADDING",
    "Full",
    "Policy",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "largest",
    "most_recent",
    "part",
    "union",
]
