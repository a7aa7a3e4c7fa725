"""Counts the bytes that kernels load and store, in Triton's interpreter: what a learner without a GPU can improve.

These are the bytes that a kernel asks for. On a GPU, part of them come from the L2 cache; what cannot be avoided is to
read every input once and to write every output once.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from benchmark.measure import n_bytes
from benchmark.oracle import GradientOracle, StatisticsOracle
from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward.tile_config import TileConfig

COLUMNS = ("operator", "stage", "read", "written", "least", "ratio", "right", "status", "kernels")


class Traffic:
    """What the kernels inside a `with counted()` block did, in bytes; `kernels` maps names to (read, written)."""

    def __init__(self):
        self.kernels: dict[str, list[int]] = {}
        self.programs: dict[str, int] = {}
        self._current = "?"

    @property
    def read(self) -> int:
        """Return all bytes loaded."""
        return sum(read for read, _ in self.kernels.values())

    @property
    def written(self) -> int:
        """Return all bytes stored."""
        return sum(written for _, written in self.kernels.values())

    def start(self, kernel: str, programs: int) -> None:
        """Count for this kernel from now on."""
        self._current = kernel
        self.kernels.setdefault(kernel, [0, 0])
        self.programs[kernel] = self.programs.get(kernel, 0) + programs

    def add(self, read: int, written: int) -> None:
        """Count an access of the current kernel."""
        self.kernels[self._current][0] += read
        self.kernels[self._current][1] += written


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what interpreted kernels load and store; elements that a mask or a tensor's end hides do not count."""
    traffic, builder = Traffic(), interpreter.interpreter_builder
    load, store, rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    run = interpreter.GridExecutor.__call__

    def size(pointers, mask) -> int:
        element = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return element * int(np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape)))

    def counting_load(pointers, mask, *args, **kwargs):
        traffic.add(size(pointers, mask), 0)
        return load(pointers, mask, *args, **kwargs)

    def counting_store(pointers, value, mask, *args, **kwargs):
        traffic.add(0, size(pointers, mask))
        return store(pointers, value, mask, *args, **kwargs)

    def counting_rmw(operation, pointers, value, mask, *args, **kwargs):  # reads and writes
        traffic.add(*[size(pointers, mask)] * 2)
        return rmw(operation, pointers, value, mask, *args, **kwargs)

    def counting_run(self, *args, **kwargs):
        grid = self.grid(kwargs) if callable(self.grid) else self.grid
        traffic.start(self.fn.__name__, int(np.prod(grid)))
        return run(self, *args, **kwargs)

    patches = {
        "create_masked_load": counting_load,
        "create_masked_store": counting_store,
        "create_atomic_rmw": counting_rmw,
    }
    for name, patch in patches.items():
        setattr(builder, name, patch)
    interpreter.GridExecutor.__call__ = counting_run
    try:
        yield traffic
    finally:
        for name in patches:
            delattr(builder, name)
        interpreter.GridExecutor.__call__ = run


class Operator(NamedTuple):
    """Kernels that are counted together."""

    stage: int
    call: Callable[[], tuple[Tensor, ...]]  # what it writes
    inputs: tuple[Tensor, ...]  # what it cannot do without
    right: Callable[[tuple[Tensor, ...]], bool]


def operators(impl: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Operator]:
    """Return the operators of stages 2 to 4, out of the reference's modules or the exercises'.

    Raises:
        ModuleNotFoundError: a stage has no such module.
    """
    suffix = ".exercise" if impl == "exercise" else ""

    def module(name: str):
        stage, _, file = name.partition(".")
        return importlib.import_module(f"{stage}{suffix}.{file}")

    stage2, split_kv = module("stage2_triton_forward.launch"), module("stage2_triton_forward.split_kv")
    stage3, linear = module("stage3_scores_and_sums.launch"), module("stage3_scores_and_sums.linear_sums")
    column_sums = module("stage3_scores_and_sums.column_sums")
    stage4 = module("stage4_backward.launch")
    from stage4_backward.gradients import Gradients

    oracle = StatisticsOracle(q, k, v, 0)
    output, lse, *_ = naive_attention(q, k, v, True)
    grad_output = torch.randn_like(q)
    grads = GradientOracle(q, k, v, grad_output, True)

    def agrees(*fields):
        return lambda results: all(map(oracle.agrees, fields, results))

    qkv, setting = (q, k, v), Setting(causal=True)
    attend = (*qkv, setting)
    fused = partial(stage3.attention_with_col_sum, *attend)
    forward = agrees("output", "lse")
    return {
        "simple kernel": Operator(2, lambda: stage2.simple_forward(*qkv, True), qkv, forward),
        "forward loop": Operator(2, lambda: stage2.forward(*attend), qkv, forward),
        "forward loop, 2 splits": Operator(2, lambda: split_kv.attention_forward(*attend, n_splits=2), qkv, forward),
        "scores and output": Operator(
            3, lambda: stage3.attention_with_scores(*attend), qkv, agrees("output", "lse", "scores")
        ),
        "scores alone": Operator(
            3, lambda: (stage3.compute_attention_scores(q, k, setting),), (q, k), agrees("scores")
        ),
        "row sum, linear": Operator(3, lambda: (linear.linear_row_sum(q, k, setting),), (q, k), agrees("row_sum")),
        "row sum, Kahan": Operator(
            3,
            lambda: stage3.attention_with_row_sum(*attend, algorithm="kahan"),
            qkv,
            agrees("output", "lse", "row_sum"),
        ),
        "column sum, linear": Operator(3, lambda: (linear.linear_col_sum(q, k, setting),), (q, k), agrees("col_sum")),
        "column sum, atomic reverse": Operator(
            3, lambda: fused(algorithm="atomic_reverse"), qkv, agrees("output", "lse", "col_sum")
        ),
        "softmax column sum": Operator(
            3, lambda: (column_sums.softmax_col_sum(q, k, lse, setting),), (q, k, lse), agrees("softmax_col_sum")
        ),
        "backward": Operator(
            4,
            lambda: stage4.backward(*qkv, output, lse, Gradients(grad_output), setting)[:3],
            (*qkv, output, grad_output, lse),
            lambda results: grads.agrees(output, results),
        ),
    }


def traffic_rows(impl: str, shape: dict[str, int], tile: tuple[int, ...] = (), only: str = "") -> Iterator[dict]:
    """Count each operator, causal and in fp16.

    Args:
        impl: "reference" or "exercise".
        shape: n, n_heads, n_kv_heads and head_dim.
        tile: BLOCK_M and BLOCK_N of the forward loop; () for the interpreter's.
        only: operators whose name contains this.
    """
    generator = torch.Generator().manual_seed(0)
    heads = (shape["n_heads"], shape["n_kv_heads"], shape["n_kv_heads"])
    q, k, v = (torch.randn(1, h, shape["n"], shape["head_dim"], generator=generator).half() for h in heads)
    configs = {"forward": TileConfig(*tile, 4, 2)} if tile else {}
    for name, operator in operators(impl, q, k, v).items():
        if only not in name:
            continue
        row = {"operator": name, "stage": operator.stage}
        try:
            with _chosen_everywhere(configs), counted() as traffic:
                results = operator.call()
        except (NotImplementedError, AssertionError, interpreter.InterpreterError) as error:
            yield row | {"status": f"not written yet: {_reason(error)}"}
            continue
        least = n_bytes(*operator.inputs) + n_bytes(*results)
        row |= {"read": traffic.read, "written": traffic.written, "least": least}
        row |= {"ratio": (traffic.read + traffic.written) / least, "kernels": traffic.kernels}
        yield row | {"right": operator.right(results), "status": "ok"}


@contextmanager
def _chosen_everywhere(configs: dict[str, TileConfig]) -> Iterator[None]:
    """Choose tile configs in the reference and in the exercises, which have a copy of the module of their own."""
    with ExitStack() as stack:
        for suffix in ("", ".exercise"):
            module = importlib.import_module(f"stage2_triton_forward{suffix}.tile_config")
            stack.enter_context(module.choose(**configs))
        yield


def _reason(error: BaseException) -> str:
    """Return the first line of what an exercise raised; the interpreter wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
