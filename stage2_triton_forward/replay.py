"""Replays calls. A call like an earlier one allocates the same, launches the same, and has nothing to work out.

A function that only allocates and launches is written down as a tape when it is called for the second time with tensors
of the same layout and the same numbers: what it allocates, which kernels it launches, and which pointers go where. From
then on the tape is played. Whatever else a call may do (an operation of PyTorch, another stream) leaves no tape.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stage1_pytorch_tiled.setting import Setting

from . import launcher
from .launcher import TileDescriptor
from .tile_config import nothing_is_chosen

_N_NUMBERS = Setting._fields.index("sinks")  # from there on fields are tensors
_MANY = 4096  # calls that are remembered before all are forgotten

P = ParamSpec("P")
R = TypeVar("R")


class Slot(NamedTuple):
    """An address: that of a tensor of the call, and some bytes."""

    tensor: int  # the inputs come first, then what is allocated, in turn
    offset: int


class Launch(NamedTuple):
    """A launch of the tape."""

    function: Callable  # in C
    arguments: list  # all of its arguments; stream, maps and pointers are to be filled in
    maps: list[tuple[int, Slot, tuple]]  # of each descriptor: its place, whose, and its map's other arguments
    pointers: list[tuple[int, Slot]]
    tuples: list[tuple[int, tuple]]  # arguments that hold pointers themselves: Slots stand for these


class Result(NamedTuple):
    """One of the tensors returned: a tensor of the call, or a view of one."""

    tensor: int
    view: tuple | None  # shape, strides and offset


class Tape(NamedTuple):
    """All that a call did."""

    rooms: list[tuple[tuple[int, ...], torch.dtype]]  # what it allocated
    launches: list[Launch]
    results: list[Result | None]


_tapes: dict[Hashable, Tape | None] = {}  # None: of a call that leaves none
_seen: set[Hashable] = set()


def replayed(function: Callable[P, R]) -> Callable[P, R]:
    """Replay calls of a function of q, other tensors, numbers and Settings that returns a tuple of tensors."""

    @functools.wraps(function)
    def call(*args: P.args, **own: P.kwargs) -> R:
        first: Any = args[0] if args else own["q"]
        if not (first.is_cuda and launcher.may_repeat() and nothing_is_chosen()) or _recorder() is not None:
            return function(*args, **own)
        inputs: list[Tensor] = []
        key = (function, *[_part(x, inputs) for x in args], *[_part(x, inputs) for x in own.values()], *own)
        addresses = [x.data_ptr() for x in inputs]
        if len(set(addresses)) < len(addresses):
            key = (*key, *map(addresses.index, addresses))
        tape = _tapes.get(key)
        if tape is not None and first.device.index == torch.cuda.current_device():
            return _play(tape, inputs, addresses)  # type: ignore[return-value]
        if key in _tapes or _is_random(*args, *own.values()) or first.device.index != torch.cuda.current_device():
            return function(*args, **own)
        if key not in _seen:
            _forget_if_many()
            _seen.add(key)
            return function(*args, **own)
        with _Recorder(inputs) as recorder:
            results = function(*args, **own)
        _tapes[key] = recorder.tape(results)
        return results

    return call


def _recorder():
    """Return what writes down the call that runs in this thread, or None."""
    return getattr(launcher.state, "recorder", None)


def forget_tapes() -> None:
    """Take every next call for the first of its kind."""
    _tapes.clear()
    _seen.clear()


def _forget_if_many() -> None:
    if len(_seen) >= _MANY:
        forget_tapes()


def _is_random(*values) -> bool:
    """Return whether a call drops weights: its seed, which changes from call to call, is part of the launches."""
    return any(type(x) is Setting and x.dropout_p > 0 for x in values)


def _part(x: Any, inputs: list[Tensor]) -> Hashable:
    """Return all of an argument that a tape may depend on; put its tensors into `inputs`."""
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter:
        inputs.append(x)
        return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16
    if kind is Setting:  # most have no tensors
        return x[:_N_NUMBERS], *[None if field is None else _part(field, inputs) for field in x[_N_NUMBERS:]]
    if isinstance(x, tuple):
        return kind, *[_part(field, inputs) for field in x]
    return x


def _play(tape: Tape, inputs: list[Tensor], addresses: list[int]) -> tuple:
    """Allocate and launch what the tape says; return the results."""
    first = inputs[0]
    for shape, dtype in tape.rooms:
        room = first.new_empty(shape, dtype=dtype)
        inputs.append(room)
        addresses.append(room.data_ptr())
    driver = launcher.active_driver()
    stream, fill = driver.get_current_stream(first.device.index), driver.utils.fill_tma_descriptor
    for launch in tape.launches:
        arguments = launch.arguments.copy()
        arguments[launcher.STREAM] = stream
        for place, (tensor, offset), tile_map in launch.maps:
            arguments[place] = fill(addresses[tensor] + offset, *tile_map)
        for place, (tensor, offset) in launch.pointers:
            arguments[place] = addresses[tensor] + offset
        for place, fields in launch.tuples:
            arguments[place] = _filled(fields, addresses)
        launch.function(*arguments)
    return tuple([None if x is None else _result(x, inputs) for x in tape.results])


def _filled(fields: tuple, addresses: list[int]) -> tuple:
    """Return a tuple with addresses for Slots."""
    return tuple(
        [
            (addresses[x.tensor] + x.offset if type(x) is Slot else _filled(x, addresses)) if type(x) in _OPEN else x
            for x in fields
        ]
    )


class _Open(tuple):
    """A tuple within which a Slot stands."""


_OPEN = (Slot, _Open)


def _result(result: Result, tensors: list[Tensor]) -> Tensor:
    x = tensors[result.tensor]
    return x if result.view is None else x.as_strided(*result.view)


class _Recorder(TorchDispatchMode):
    """Writes down what a call allocates and launches, and notices whatever else it does."""

    def __init__(self, inputs: list[Tensor]):
        super().__init__()
        self.tensors = list(inputs)
        self.n_inputs = len(inputs)
        self.launches: list[Launch] = []
        self.is_sound = True

    def __enter__(self):
        launcher.state.recorder = self
        self.stream = torch.cuda.current_stream()
        return super().__enter__()

    def __exit__(self, *error):
        launcher.state.recorder = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.tensors.append(result)
        elif not _only_views(func):
            self.is_sound = False
        return result

    def note(self, repeatable: launcher.Repeatable | None, grid: tuple[int, ...], args: tuple) -> None:
        """Write down a launch; None is one that cannot be repeated."""
        if repeatable is None or torch.cuda.current_stream() != self.stream:
            self.is_sound = False
            return
        arguments = [*launcher.packed_grid(grid), 0, *repeatable.head]
        maps, pointers, tuples, tile_maps = [], [], [], iter(repeatable.maps)
        for x in args:
            x = launcher.as_kernel_takes_it(x)
            place = len(arguments)
            if type(x) is TileDescriptor:
                tile_map, layout = next(tile_maps), x.layout
                if tile_map is None:
                    pointers.append((place, self._slot(x.base)))
                else:
                    maps.append((place, self._slot(x.base), (*tile_map, layout.shape, layout.strides, 0)))
                arguments.extend(launcher.unpacked(x, tile_map))
            elif isinstance(x, Tensor):
                pointers.append((place, self._slot(x)))
                arguments.append(0)
            elif isinstance(x, tuple) and launcher.holds_tensors(x):
                tuples.append((place, self._open(x)))
                arguments.append(None)
            else:
                arguments.append(x)
        arguments.extend(repeatable.tail)
        self.launches.append(Launch(repeatable.launch, arguments, maps, pointers, tuples))

    def tape(self, results: tuple) -> Tape | None:
        """Return all that was written down, or None where something cannot be."""
        found = [None if x is None else self._as_result(x) for x in results]
        rooms = self.tensors[self.n_inputs :]
        if not self.is_sound or not all(x.is_contiguous() for x in rooms):
            return None
        return Tape([(tuple(x.shape), x.dtype) for x in rooms], self.launches, found)

    def _slot(self, x: Tensor) -> Slot:
        """Say which tensor of the call x is, or a part of; that must not hang on where tensors happen to lie."""
        for i, tensor in enumerate(self.tensors):
            if x is tensor:
                return Slot(i, 0)
        storage = x.untyped_storage().data_ptr()
        owners = [i for i, tensor in enumerate(self.tensors) if tensor.untyped_storage().data_ptr() == storage]
        if len(owners) != 1:
            self.is_sound = False
            return Slot(0, 0)
        return Slot(owners[0], x.data_ptr() - self.tensors[owners[0]].data_ptr())

    def _open(self, x: Any) -> Any:
        """Return a tuple with Slots for tensors."""
        if isinstance(x, Tensor):
            return self._slot(x)
        if isinstance(x, tuple) and launcher.holds_tensors(x):
            return _Open(map(self._open, x))
        return x

    def _as_result(self, x: Tensor) -> Result:
        slot = self._slot(x)
        owner = self.tensors[slot.tensor]
        if x is owner:
            return Result(slot.tensor, None)
        if slot.tensor < self.n_inputs:
            self.is_sound = False
        return Result(slot.tensor, (tuple(x.shape), x.stride(), slot.offset // x.element_size()))


_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


@functools.cache
def _only_views(func) -> bool:
    """Return whether an operator looks at a tensor's memory in another way, and does nothing to it."""
    aliases = [x.alias_info for x in func._schema.arguments if x.alias_info is not None]
    return bool(aliases) and not any(x.is_write for x in aliases)
