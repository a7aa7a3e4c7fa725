"""Triton's interpreter without what it does over and over: the same results in a quarter of the time.

It touches Triton's private names, so it knows for which versions it works, and leaves others as they are.
"""

from collections.abc import Callable
from functools import cache, cached_property, wraps
from typing import Any

import triton

_KNOWN_VERSIONS = ("3.6.",)
_INTEGER_OPERATIONS = {"add": "__add__", "sub": "__sub__", "mul": "__mul__"}


def quicken() -> None:
    """Let the interpreter do once for each launch, or once for all, what it does for each operation."""
    from triton.runtime import interpreter

    if not triton.__version__.startswith(_KNOWN_VERSIONS) or hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    interpreter._patch_lang = patched_once(interpreter._patch_lang, interpreter._LangPatchScope())
    interpreter._get_np_dtype = remembered(interpreter._get_np_dtype)
    type_on_demand(triton.language.core.tuple)
    described_once(triton.language.core.block_type)
    semantic = interpreter.TritonSemantic
    semantic.binary_op_sanitize_overflow_impl = checked_at_once(semantic.binary_op_sanitize_overflow_impl)


def patched_once(patch_language: Callable, nothing) -> Callable:
    """Wrap `_patch_lang`, which puts interpreted operations into `triton.language` for the time of a launch.

    Triton calls it for every jitted function that a kernel calls, too, and looks through the whole language each time.

    Args:
        patch_language: takes a function; returns a scope, whose `restore()` takes everything back.
        nothing: a scope that has nothing to restore.
    """
    under_way: set[int] = set()  # the modules that the launch under way has patched

    @wraps(patch_language)
    def patch(function):
        modules = _language_modules(function) - under_way
        if not modules:
            return nothing
        under_way.update(modules)
        scope = patch_language(function)
        restore = scope.restore

        def restore_all():
            restore()
            under_way.difference_update(modules)

        scope.restore = restore_all
        return scope

    return patch


@cache
def _language_modules(function) -> frozenset[int]:
    """Return the ids of the modules of Triton's language that a jitted function's own module has imported."""
    language = triton.language
    return frozenset(id(x) for x in function.__globals__.values() if x is language or x is language.core)


def remembered(numpy_dtype: Callable) -> Callable:
    """Wrap `_get_np_dtype`, which makes a table of all dtypes at every call."""
    of_scalar = cache(lambda name: numpy_dtype(triton.language.dtype(name)))
    of_pointer = numpy_dtype(triton.language.pointer_type(triton.language.int8))

    @wraps(numpy_dtype)
    def lookup(dtype):
        scalar = dtype.scalar
        return of_pointer if scalar.is_ptr() else of_scalar(scalar.name)

    return lookup


def type_on_demand(language_tuple: Any) -> None:
    """Let a tuple of Triton's language, such as every shape, find out its type when somebody asks for it."""
    init = language_tuple.__init__

    @wraps(init)
    def remember_values(self, args, type=None):
        if type is None:
            self.values = list(args)
        else:
            init(self, args, type)

    def find_type(self):
        whole = language_tuple.__new__(language_tuple)
        init(whole, self.values)
        return whole.type

    language_tuple.__init__ = remember_values
    language_tuple.type = cached_property(find_type)
    language_tuple.type.__set_name__(language_tuple, "type")


def described_once(block_type: Any) -> None:
    """Let the type of a tile, made anew by every operation, take shape, size and name from an earlier one like it."""
    init = block_type.__init__
    described: dict[tuple, dict] = {}

    @wraps(init)
    def describe(self, element_ty, shape):
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in described:
            init(self, element_ty, shape)
            described[key] = dict(vars(self))
        vars(self).update(described[key])

    block_type.__init__ = describe


def checked_at_once(check: Callable) -> Callable:
    """Wrap the check of integers that overflow, for which Triton interprets six operations; then it drops the result.

    This one raises. A kernel that wraps around on purpose says `sanitize_overflow=False`, as Triton's Philox does.
    """

    @wraps(check)
    def check_overflow(self, lhs, rhs, binary_op):
        dtype = lhs.type.scalar
        if dtype.int_bitwidth >= 64:
            return
        left, right = (x.handle.data.astype("int64") for x in (lhs, rhs))
        result = getattr(left, _INTEGER_OPERATIONS[binary_op.__name__])(right)
        in_range = (result >= dtype.get_int_min_value()) & (result <= dtype.get_int_max_value())
        assert in_range.all(), f"int{dtype.int_bitwidth} overflow detected for operation {binary_op.__name__}"

    return check_overflow
