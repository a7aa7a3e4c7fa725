"""Launches kernels. A launch like an earlier one skips Triton's dispatch, which costs more than a short kernel runs.

Triton's own `kernel[grid](...)` looks at every argument, and at every field of every tuple, before it finds what it
compiled. Here launches are told apart by the *kinds* of their arguments: dtypes, tile shapes, constexprs, and what
Triton specialises numbers and addresses for. Launches of one kind share one compiled kernel; only pointers, descriptors
and numbers are filled in anew.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

_KNOWN_VERSIONS = ("3.6.",)  # of Triton, whose launchers are built as below; any other launches in its own way
_IS_KNOWN = triton.__version__.startswith(_KNOWN_VERSIONS)
_REPEATS = _IS_KNOWN and not knobs.runtime.interpret
if _IS_KNOWN:
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend


class Layout(NamedTuple):
    """How a tensor [B, H, N, D] is cut into tiles of whole rows, clipped at the end of each head."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # with the last one 1, as the hardware wants them
    tile: list[int]
    kind: int  # what a compiled kernel depends on: dtype and tile


class TileDescriptor(NamedTuple):
    """A tensor that a kernel loads or stores tile by tile."""

    base: Tensor
    layout: Layout


class Known(NamedTuple):
    """An argument that has been looked at, so that no launch has to look into it again."""

    value: Any  # a NamedTuple, as the kernel is given it
    kind: Hashable


class Repeatable(NamedTuple):
    """A compiled kernel, and all about its launches that stays the same."""

    launch: Callable  # in C
    head: tuple  # what it wants to know before the arguments
    maps: list[tuple | None]  # of each descriptor: swizzle, element size and type, tile; None for a GPU without TMA
    tail: tuple  # stands for the constexprs
    alive: tuple  # whose addresses are part of the key


STREAM = 3  # its place among the arguments of a C launcher, after the grid

_repeatable: dict[tuple, Repeatable | None] = {}
_kind_numbers: dict[Hashable, int] = {}
_kept_alive: list[constexpr] = []  # their addresses are part of kinds that have numbers
state = threading.local()  # `recorder`: writes down the launches of a call, see `replay.py`


def launch(kernel, grid: tuple[int, ...], config, *args, **constants) -> None:
    """Launch a kernel on the device of its first argument, on the current stream.

    Args:
        kernel: a `@triton.jit` function.
        grid: how many programs, in up to three dimensions.
        config: has num_warps and num_stages.
        args: all before the constexprs, the first a tensor or TileDescriptor; numbers, tensors, and tuples of such.
        constants: the constexprs.
    """
    first = args[0]
    device = (first.base if type(first) is TileDescriptor else first).device
    if device.type != "cuda":
        _launch_by_triton(kernel, grid, config, args, constants)
    elif device.index == torch.cuda.current_device():
        _launch(kernel, grid, config, device.index, args, constants)
    else:
        with torch.cuda.device(device):  # Triton launches on the current device
            _launch(kernel, grid, config, device.index, args, constants)


def known(value: tuple) -> Known:
    """Look at a NamedTuple of numbers and constexprs once, for all launches that are given it."""
    if not _IS_KNOWN:
        return Known(value, None)
    kind = _kind(value)
    if kind not in _kind_numbers:
        _kept_alive.extend(_constexprs(value))
    return Known(value, kind_number(kind))


def kind_number(kind: Hashable) -> int:
    """Return a small number that stands for a kind: keys made of these are found faster."""
    return _kind_numbers.setdefault(kind, len(_kind_numbers))


def forget_launches() -> None:
    """Take every next launch for the first of its kind."""
    _repeatable.clear()


def _launch(kernel, grid, config, device: int, args: tuple, constants: dict) -> None:
    recorder = getattr(state, "recorder", None)
    if not (may_repeat() and isinstance(kernel, triton.JITFunction) and not kernel.pre_run_hooks):
        _launch_by_triton(kernel, grid, config, args, constants)
        if recorder is not None:
            recorder.note(None, grid, args)
        return
    key = (id(kernel), device, config.num_warps, config.num_stages, *constants.values(), *map(_kind, args))
    repeatable = _repeatable.get(key)
    if repeatable is None:
        compiled = _launch_by_triton(kernel, grid, config, args, constants)
        repeatable = _repeatable[key] = _prepare(kernel, compiled, args)
        if recorder is not None:
            recorder.note(repeatable, grid, args)
        return
    if recorder is not None:
        recorder.note(repeatable, grid, args)
    packed: list[Any] = packed_grid(grid)
    packed.append(active_driver().get_current_stream(device))
    packed.extend(repeatable.head)
    maps = iter(repeatable.maps)
    for x in args:
        kind = type(x)
        if kind is TileDescriptor:
            packed.extend(unpacked(x, next(maps)))
        elif kind is Tensor:
            packed.append(x.data_ptr())
        else:
            packed.append(x.value if kind is Known else x)
    repeatable.launch(*packed, *repeatable.tail)


def active_driver() -> Any:
    """Return Triton's driver of the GPU."""
    return triton.runtime.driver.active


def packed_grid(grid: tuple[int, ...]) -> list[int]:
    """Return a grid in three dimensions."""
    return [*grid, 1, 1][:3]


def may_repeat() -> bool:
    """Return whether Triton can be passed by: where its version is known, and no profiler wants to see launches."""
    runtime = knobs.runtime
    return (
        _REPEATS
        and not getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        and not getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )


def _launch_by_triton(kernel, grid, config, args: tuple, constants: dict):
    """Launch in Triton's own way; return what it compiled."""
    plain = map(as_triton_takes_it, args)
    return kernel[grid](*plain, **constants, num_warps=config.num_warps, num_stages=config.num_stages)


def as_kernel_takes_it(x):
    """Return an argument of `launch` as the C launcher takes it, descriptors aside."""
    return x.value if type(x) is Known else x


def holds_tensors(x) -> bool:
    """Return whether there is a tensor within an argument."""
    return isinstance(x, Tensor) or (isinstance(x, tuple) and any(map(holds_tensors, x)))


def as_triton_takes_it(x):
    """Return an argument of `launch` as `kernel[grid](…)` takes it."""
    if type(x) is TileDescriptor:
        return TensorDescriptor(x.base, list(x.layout.shape), list(x.layout.strides), x.layout.tile)
    return as_kernel_takes_it(x)


def _kind(x) -> Hashable:
    """Return all of an argument that a compiled kernel may depend on."""
    kind = type(x)
    if kind is TileDescriptor:
        return x.layout.kind
    if kind is Known:
        return x.kind
    if kind is Tensor:
        return x.dtype, x.data_ptr() % 16 == 0
    if kind is constexpr:
        return id(x)
    if isinstance(x, tuple):
        return kind, *map(_kind, x)
    return native_specialize_impl(BaseBackend, x, False, True, True)  # of a number its type, 1, and multiples of 16


def _prepare(kernel, compiled, args: tuple) -> Repeatable | None:
    """Return what a repeated launch needs, or None for a kernel that only Triton can launch."""
    launcher: Any = compiled.run if isinstance(compiled, CompiledKernel) else None
    if launcher is None or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    launch = launcher.launch
    n_descriptors = sum(type(x) is TileDescriptor for x in args)
    if n_descriptors:  # Triton unpacks descriptors in a closure around the C function; here `_launch` does
        launch = dict(zip(launch.__code__.co_freevars, launch.__closure__, strict=True))["launcher"].cell_contents
    maps = [_tile_map(meta) for meta in compiled.metadata.tensordesc_meta or [None] * n_descriptors]
    head = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)
    head += (compiled.packed_metadata, None, None, None)  # no hooks
    tail = (None,) * (len(kernel.params) - len(args))
    return Repeatable(launch, head, maps, tail, (kernel, *_constexprs(args)))


def _constexprs(x) -> list[constexpr]:
    """Return the constexprs of an argument."""
    if type(x) is constexpr:
        return [x]
    return [y for field in x for y in _constexprs(field)] if isinstance(x, tuple) else []


def _tile_map(meta: dict | None) -> tuple | None:
    """Return what TMA's map of a tensor holds beside the tensor."""
    if meta is None:
        return None
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    return meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["block_size"]


def unpacked(x: TileDescriptor, tile_map: tuple | None) -> list:
    """Return what a kernel gets for a descriptor, as Triton's own launcher unpacks it."""
    shape, strides = x.layout.shape, x.layout.strides
    if tile_map is None:
        return [x.base.data_ptr(), *shape, *strides, False, *shape, *strides]
    fill = active_driver().utils.fill_tma_descriptor
    return [fill(x.base.data_ptr(), *tile_map, shape, strides, 0), *shape, *strides]
