"""Record how an engine loads a model instead of copying its weights: the first half of a recorded load.

    recording = Recording("cpu", [attachment])
    with recording.building():
        model = Engine()                                     # parameters without memory
    with recording.loading():
        model.load_weights(attachment.state_dict().items())  # copies are noted, not made
    binding = bind(model, recording)                         # weightd.binding: parameters become views of the store
    with recording.guarding():
        post_process(model)                                  # may not write to what is shared

A parameter without memory is a tensor on torch's "meta" device whose storage the recording knows. A copy of stored
bytes into it, of equal dtype and in one run on both sides, is noted. Anything else that needs its bytes, a read or a
write, gives it memory of its own first, with all that was noted until then: so values are always those that the
engine would have computed. No names and no architectures are known here.

The recording sees what goes through torch's dispatcher. It does not see a kernel that is launched past it, or code that
takes `data_ptr()`: on a GPU the read-only mapping stops such a write (`Attachment`), on the host it goes to a private
copy of the page, which `report` finds.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ._mapping.ranges import MappedExtents
from .errors import SharedWeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import FrameType

    from .attachment import Attachment

_aten = torch.ops.aten

_LOOKS = frozenset({_aten.is_pinned.default, _aten.is_same_size.default})
"""Operations that look at no bytes."""


class NotedCopy(NamedTuple):
    """A copy of stored bytes that was not made: to `start` of the parameter's storage, in bytes, from `source`."""

    start: int
    length: int
    source: torch.Tensor


class _Phase(enum.Enum):
    BUILDING = enum.auto()
    LOADING = enum.auto()
    GUARDING = enum.auto()


class DeferredStorage:
    """The bytes of one or more tensors of an engine that have no memory yet, and what is to be copied into them.

    `memory` is None until something needed the bytes, and `reason` says what. It is one dimension of torch.uint8.
    """

    def __init__(self, storage: torch.UntypedStorage, device: torch.device) -> None:
        self.storage = storage  # kept, so that no other storage takes its identity
        self.nbytes = storage.nbytes()
        self.memory: torch.Tensor | None = None
        self.reason = ""
        self._device = device
        self._copies: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def copies(self) -> list[NotedCopy]:
        """What was noted, in order of place."""
        return [NotedCopy(*place, source) for place, source in sorted(self._copies.items(), key=lambda item: item[0])]

    @property
    def used_elsewhere(self) -> bool:
        """Whether a tensor still has this storage."""
        return torch._C._storage_Use_Count(self.storage._cdata) > 1

    def note(self, start: int, length: int, source: torch.Tensor) -> None:
        """Remember a copy; a later one to the same place replaces an earlier one."""
        self._copies.pop((start, length), None)
        self._copies[start, length] = source

    def be(self, memory: torch.Tensor) -> None:
        """Have memory that holds the bytes already: the store's."""
        self.memory = memory
        self._copies.clear()

    def materialize(self, reason: str) -> None:
        """Have private memory, with what was noted; `reason` says what for. Once only."""
        if self.memory is not None:
            return
        self.memory = torch.zeros(self.nbytes, dtype=torch.uint8, device=self._device)
        self.reason = reason
        for (start, length), source in self._copies.items():  # in the order of the engine's copies: they may overlap
            self.memory[start : start + length].view(source.dtype).copy_(source.as_strided((source.numel(),), (1,)))
        self._copies.clear()

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that `tensor`, which has this storage, is with memory."""
        assert self.memory is not None
        if tensor.untyped_storage().nbytes() != self.nbytes:
            raise RuntimeError("a parameter was resized while it had no memory")
        empty = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return empty.set_(self.memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


class Recording:
    """Phases of one engine's load on one device; see the module. `attachments` are where stored tensors come from.

    Used by one thread, which is the one that builds and loads: the modes that are entered are that thread's.
    """

    def __init__(self, device: str | torch.device, attachments: Iterable[Attachment] = ()) -> None:
        self.device = torch.device(device)
        self.attachments: list[Attachment] = []
        self.deferred: dict[int, DeferredStorage] = {}
        self._extents = MappedExtents(())
        self._names: Callable[[int], str] = lambda address: "a parameter"
        for one in attachments:
            self.add(one)

    def add(self, attachment: Attachment) -> None:
        """Let stored tensors come from one more attachment, too. Errors: InvalidReferenceError (it is closed)."""
        self.attachments.append(attachment)
        self._extents = MappedExtents(place for one in self.attachments for place in one.ranges())

    def building(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `torch.empty` on the device gives tensors without memory."""
        return self._in(_Phase.BUILDING)

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Inside, copies of stored bytes into tensors without memory are noted."""
        return self._in(_Phase.LOADING)

    def guarding(self, names: Callable[[int], str] | None = None) -> contextlib.AbstractContextManager[None]:
        """Inside, a write to stored bytes raises SharedWeightsError; copying them onto themselves is left out.

        `names` says which parameter lies at an address, for the message.
        """
        if names is not None:
            self._names = names
        return self._in(_Phase.GUARDING)

    @contextlib.contextmanager
    def _in(self, phase: _Phase) -> Iterator[None]:
        with _Mode(self, phase):
            yield

    # -- looked up by the mode and by `bind` ---------------------------------------------------------------------------

    def storage_of(self, tensor: torch.Tensor) -> DeferredStorage | None:
        """What a tensor without memory has instead; None for any other tensor."""
        return self.deferred.get(tensor.untyped_storage()._cdata) if tensor.is_meta else None

    def defer(self, tensor: torch.Tensor) -> None:
        """Take a tensor on the meta device for one without memory."""
        storage = tensor.untyped_storage()
        self.deferred[storage._cdata] = DeferredStorage(storage, self.device)

    def is_stored(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has bytes, and all of them are attached memory."""
        if tensor.is_meta or not tensor.numel() or tensor.device.type != self.device.type:
            return False
        try:
            return self._extents.hold(tensor.data_ptr(), _extent(tensor))
        except (RuntimeError, NotImplementedError):  # it has no storage of its own, as subclasses may
            return False

    def copied(self, target: torch.Tensor, source: torch.Tensor) -> str:
        """Note a copy into a tensor without memory; the reason where it has to be made, else empty."""
        deferred = self.storage_of(target)
        assert deferred is not None
        if target.dtype != source.dtype:
            return f"cast from {_dtype(source)} to {_dtype(target)}"
        if not self.is_stored(source):
            return "made by the engine while it loads"
        if target.shape != source.shape or not _is_run(target) or not _is_run(source) or not _alike(target, source):
            return "sliced, transposed or expanded while it is loaded: its bytes are no run of stored ones"
        deferred.note(int(target.storage_offset()) * target.element_size(), target.nbytes, source)
        return ""

    def refuse_write(self, func: Any, tensor: torch.Tensor) -> None:
        """Raise SharedWeightsError if a tensor that is written to is stored."""
        if self.is_stored(tensor):
            raise SharedWeightsError(
                f"{_caller()} would write to {self._names(tensor.data_ptr())} ({func.name()}), whose bytes other "
                "processes read; give it memory of its own: the option `private`"
            )


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """What the thread's operations become in one phase."""

    def __init__(self, recording: Recording, phase: _Phase) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._recording = recording
        self._phase = phase

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called instead of every operation of the thread."""
        if not kwargs and func in _views:  # most of what loaders do
            return func(*args)
        recording, kwargs = self._recording, dict(kwargs or {})
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        without = [one for one in tensors if recording.storage_of(one) is not None]
        if self._phase is not _Phase.GUARDING and _on_meta(kwargs):  # engines ask parameters for their device
            if func is _aten._to_copy.default and not without:
                return self._moved(func, args, kwargs)
            kwargs["device"] = recording.device
        if not tensors or (without and func in _LIKE):
            if without and kwargs.get("device") is None:
                kwargs["device"] = recording.device
            return self._made(func, args, kwargs)
        if func is _aten.copy_.default and without and without[0] is args[0]:
            return self._copy(func, args, kwargs)
        written, views = _effects(func, args, kwargs)
        if not without:
            return self._guarded(func, args, kwargs, written)
        if func in _LOOKS or (views and not written) or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)  # a view of what is not there
        return self._with_memory(func, args, kwargs, without, f"{'written' if written else 'read'} by {func.name()}")

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A new tensor: without memory where an engine builds and has not said what is in it."""
        device = kwargs.get("device")
        ours = self._phase is _Phase.BUILDING and func in _EMPTY
        if not ours or (device is not None and torch.device(device).type != self._recording.device.type):
            return func(*args, **kwargs)
        tensor = func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": None})
        if not tensor.untyped_storage().nbytes():
            return func(*args, **kwargs)
        self._recording.defer(tensor)
        return tensor

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor with memory, moved to the meta device: while loading, for want of a parameter's true device."""
        if self._phase is _Phase.BUILDING:
            return func(*args, **kwargs)
        tensor = args[0]
        asked = {"dtype": tensor.dtype, "layout": tensor.layout, "memory_format": torch.preserve_format}
        is_move = all(kwargs.get(name, value) in (None, value) for name, value in asked.items())
        if is_move and self._recording.is_stored(tensor):
            return _aten.alias.default(tensor)
        return func(*args, **{**kwargs, "device": self._recording.device})

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recording, target, source = self._recording, args[0], args[1]
        if not target.numel():
            return target
        deferred = recording.storage_of(target)
        assert deferred is not None
        of_the_source = recording.storage_of(source)
        if deferred.memory is None and of_the_source is None:
            reason = recording.copied(target, source)
            if not reason:
                return target
        else:
            reason = "copied from another parameter while it is loaded"
        return self._with_memory(func, args, kwargs, [target, *([source] if of_the_source else [])], reason)

    def _with_memory(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], without: list[torch.Tensor], reason: str
    ) -> Any:
        """The operation on tensors that have memory from now on; what it returns of them is what it was given."""
        recording = self._recording
        given: dict[int, torch.Tensor] = {}
        reals: dict[int, torch.Tensor] = {}
        for tensor in without:
            if tensor.numel():
                deferred = recording.storage_of(tensor)
                assert deferred is not None
                deferred.materialize(reason)
                real = deferred.real(tensor)
            else:  # the padding of what needs none: no byte of the parameter is read or written
                real = torch.empty_like(tensor, device=recording.device)
            given[id(reals.setdefault(id(tensor), real))] = tensor
        done = func(
            *tree_map(lambda one: reals.get(id(one), one), args),
            **tree_map(lambda one: reals.get(id(one), one), kwargs),
        )
        return tree_map(lambda one: given.get(id(one), one), done)

    def _guarded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[torch.Tensor]) -> Any:
        """An operation on tensors with memory, unless it writes to stored bytes."""
        if func is _aten.copy_.default and _same_place(args[0], args[1]) and self._recording.is_stored(args[0]):
            return args[0]
        if func is not _aten.resize_.default or torch.Size(args[1]).numel() != args[0].numel():  # else no byte changes
            for tensor in written:
                self._recording.refuse_write(func, tensor)
        return func(*args, **kwargs)


_EMPTY = frozenset({_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default,
                    _aten.new_empty.default, _aten.new_empty_strided.default})  # fmt: skip
_LIKE = _EMPTY | {
    _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default, _aten.rand_like.default,
    _aten.randn_like.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default,
}  # fmt: skip
"""Operations that take shape, dtype and device from a tensor, and no bytes."""

_effects_of: dict[Any, tuple[tuple[tuple[int, str], ...], bool]] = {}
_views: set[Any] = set()


def _effects(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], bool]:
    """The tensors that an operation writes to, and whether it returns views of others, by its schema."""
    known = _effects_of.get(func)
    if known is None:
        arguments = list(enumerate(func._schema.arguments))
        aliased = [(at, one) for at, one in arguments if one.alias_info is not None]
        writes = tuple((at, one.name) for at, one in aliased if one.alias_info.is_write)
        known = _effects_of[func] = writes, any(not one.alias_info.is_write for _, one in aliased)
        if known == ((), True):
            _views.add(func)
    places, views = known
    written: list[torch.Tensor] = []
    for at, name in places:
        given = args[at] if at < len(args) else kwargs.get(name)
        written += _tensors((given,))
    return written, views


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors among an operation's arguments, which are tensors, lists of them, and what is neither."""
    found = []
    for one in values:
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += _tensors(one)
    return found


def _is_run(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are one run of bytes, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape have their elements in one order in memory."""
    return all(
        size == 1 or mine == theirs for size, mine, theirs in zip(one.size(), one.stride(), other.stride(), strict=True)
    )


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _on_meta(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _same_place(one: Any, other: Any) -> bool:
    return (
        isinstance(other, torch.Tensor)
        and not one.is_meta
        and not other.is_meta
        and one.device == other.device
        and one.dtype == other.dtype
        and one.size() == other.size()
        and one.stride() == other.stride()
        and one.data_ptr() == other.data_ptr()
        and one.is_conj() == other.is_conj()
        and one.is_neg() == other.is_neg()
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _caller() -> str:
    """The method that called torch: the first frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and not f"{name}.".startswith(("torch.", "contextlib.")):
            return f"{name}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "the engine"
