"""Chooses how Triton kernels run, which must happen before triton is first imported."""

import importlib.util
import os

import torch


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
