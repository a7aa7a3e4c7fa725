"""Chooses how Triton kernels run, which must happen before triton is first imported."""

import importlib.metadata
import importlib.util
import os

import torch
from torch.torch_version import TorchVersion


def use_interpreter_without_gpu() -> str:
    """Switch Triton to its interpreter where no GPU is present, and say which way kernels will run.

    An explicit TRITON_INTERPRET in the environment wins.

    Returns:
        "compiled", "interpreted", or "missing" where Triton has no wheels for the platform.
    """
    if importlib.util.find_spec("triton") is None:
        return "missing"
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return "interpreted" if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else "compiled"


def why_not_interpreted() -> str | None:
    """Return why Triton's interpreter cannot run here, or None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton has no wheels for this platform"
    if importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter needs numpy (below 2.4), which is not installed"
    numpy = importlib.metadata.version("numpy")
    if TorchVersion(numpy) >= "2.4":
        return f"Triton's interpreter needs numpy below 2.4, and this is {numpy}"
    return None
