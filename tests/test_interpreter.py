"""Triton's interpreter, quickened: the same bits, the language as it was, and integers that overflow are found."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheels for this platform")
import triton
import triton.language as tl
from conftest import TRITON_MODE
from helpers import Case, make_qkv

from stage1_pytorch_tiled.setting import Setting
from stage2_triton_forward import quick_interpreter
from stage2_triton_forward.launch import forward

pytestmark = pytest.mark.skipif(TRITON_MODE != "interpreted", reason="kernels are compiled here")


@triton.jit
def plus_one(x):
    return x + 1


@triton.jit
def add_kernel(x_ptr, start, FAIL: tl.constexpr):
    tl.static_assert(not FAIL, "asked to fail")
    tl.store(x_ptr, plus_one(start))


def originals(interpreter):
    """Return what `quicken` replaces, as Triton wrote it, by (object, name)."""
    places = [(interpreter, "_patch_lang"), (interpreter, "_get_np_dtype")]
    places += [(tl.core.tuple, "__init__"), (tl.core.block_type, "__init__")]
    places.append((interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl"))
    return {(place, name): getattr(place, name).__wrapped__ for place, name in places}


def test_same_bits_as_triton(monkeypatch):
    from triton.runtime import interpreter

    q, k, v = make_qkv(Case(1, 4, 2, 33, 70, 24, True), torch.float16)
    setting = Setting(causal=True, window=(40, None), softcap=3.0, dropout_p=0.3, seed=5)
    quick = forward(q, k, v, setting)
    for (place, name), original in originals(interpreter).items():
        monkeypatch.setattr(place, name, original)
    monkeypatch.delattr(tl.core.tuple, "type")
    slow = forward(q, k, v, setting)
    assert all(torch.equal(a, b) for a, b in zip(quick, slow, strict=True))


@pytest.mark.parametrize("fail", [False, True])
def test_the_language_is_what_it_was_after_a_launch(fail):
    before = tl.range, tl.load, tl.dot
    x = torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        if fail:
            with pytest.raises(triton.runtime.errors.InterpreterError, match="asked to fail"):
                add_kernel[(1,)](x, 4, FAIL=True)
        else:
            add_kernel[(1,)](x, 4, FAIL=False)
            assert x.item() == 5
        assert (tl.range, tl.load, tl.dot) == before


def test_integers_that_overflow_are_found():
    x = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 overflow detected for operation add"):
        add_kernel[(1,)](x, 2**31 - 1, FAIL=False)


def test_other_versions_are_left_alone(monkeypatch):
    from triton.runtime import interpreter

    monkeypatch.setattr(triton, "__version__", "4.0.0")
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
    quick_interpreter.quicken()
    assert not hasattr(interpreter._patch_lang, "__wrapped__")
