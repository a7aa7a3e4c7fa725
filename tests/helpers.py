"""Inputs and comparisons shared by the tests."""

import functools
import inspect
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch

from course.grader import compare
from stage1_pytorch_tiled.dense import naive_attention
from stage1_pytorch_tiled.setting import Setting

HALF = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """The shape of one attention problem."""

    batch: int
    n_heads: int
    n_kv_heads: int
    n_q: int
    n_k: int
    head_dim: int
    causal: bool

    def __str__(self):
        mask = "causal" if self.causal else "full"
        return f"b{self.batch}-h{self.n_heads}k{self.n_kv_heads}-m{self.n_q}n{self.n_k}-d{self.head_dim}-{mask}"


CASES = [
    Case(1, 1, 1, 1, 1, 16, False),
    Case(1, 1, 1, 1, 1, 16, True),
    Case(1, 2, 2, 15, 15, 16, True),
    Case(2, 2, 2, 16, 16, 32, True),
    Case(1, 2, 1, 17, 17, 16, False),
    Case(1, 4, 2, 63, 63, 64, True),
    Case(1, 2, 2, 64, 64, 64, False),
    Case(2, 4, 2, 65, 65, 32, True),
    Case(1, 6, 2, 33, 129, 24, True),  # grouped heads, M < N: a cache
    Case(1, 4, 1, 129, 33, 40, True),  # multi-query, M > N: rows that see nothing
    Case(1, 2, 2, 1, 127, 128, True),  # one decoded token
    Case(1, 2, 2, 127, 1, 16, False),
    Case(2, 3, 3, 50, 77, 7, False),  # an odd head dimension
    Case(1, 2, 1, 40, 40, 1, True),
    Case(1, 1, 1, 20, 36, 256, True),
    Case(1, 2, 2, 70, 90, 100, True),
]


def make_qkv(case, dtype=torch.float32, device="cpu", scale=1.0):
    """Draw q, k and v from a normal distribution; `scale` multiplies q."""
    q = torch.randn(case.batch, case.n_heads, case.n_q, case.head_dim, dtype=torch.float64) * scale
    k = torch.randn(case.batch, case.n_kv_heads, case.n_k, case.head_dim, dtype=torch.float64)
    v = torch.randn_like(k)
    return tuple(x.to(device, dtype) for x in (q, k, v))


def references(q, k, v, *args, **kwargs):
    """Return the oracle (float64) and the naive formula in the inputs' own dtype, both from the same rounded inputs."""
    wide = {name: _widen(value) for name, value in kwargs.items()}
    return naive_attention(_widen(q), _widen(k), _widen(v), *args, **wide), naive_attention(q, k, v, *args, **kwargs)


def assert_right(name, actual, oracle, naive, dtype=None, atol=0.0):
    """Compare a field of NaiveAttention by the course's tolerance; `dtype` is the one the contract promises.

    `atol` is allowed on top, for differences of numbers larger than themselves.
    """
    expected, rough = getattr(oracle, name), getattr(naive, name)
    assert actual.shape == expected.shape, f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    if dtype is not None:
        assert actual.dtype == dtype, f"{name} has dtype {actual.dtype}, expected {dtype}"
    result = compare(actual, expected, rough, at_least=1.0 if name == "lse" else 0.0)
    assert result.max_error <= result.allowed + atol, (
        f"{name}: error {result.max_error:.3g}, allowed {result.allowed:.3g}"
    )


@contextmanager
def default_dtype(dtype):
    """Make tensors of this dtype where none is named, as transformers does while it loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _widen(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def flat(stage):
    """Let tests say attention's options one by one, as the oracle takes them.

    Args:
        stage: a function of a stage, `f(q, k, …, setting, more, *, own…)`, or a module of such.

    Returns:
        `f(q, k, …, more, causal, sm_scale, dropout_p, seed, *, window=…, own…)`, or a module of such.
    """
    if isinstance(stage, ModuleType):
        return SimpleNamespace(**{name: flat(x) if _takes_setting(x) else x for name, x in vars(stage).items()})

    @functools.wraps(stage)
    def call(*args, **options):
        others = [x.name for x in inspect.signature(stage).parameters.values() if x.kind is x.POSITIONAL_OR_KEYWORD]
        others.remove("setting")
        own = dict(zip(others, args, strict=False))
        given = dict(zip(Setting._fields, args[len(own) :], strict=False))
        given |= {name: options.pop(name) for name in Setting._fields if name in options}
        return stage(setting=Setting(**given), **own, **options)

    return call


def _takes_setting(x):
    """Return whether x is a function, or a class like TileGrid, that is given a whole Setting."""
    is_own = getattr(x, "__module__", "").startswith("stage")
    is_callable = inspect.isfunction(x) or (inspect.isclass(x) and not issubclass(x, tuple))
    return is_own and is_callable and "setting" in inspect.signature(x).parameters
