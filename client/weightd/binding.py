"""Give the parameters of a recorded load their memory: the second half of it (`weightd.recording` is the first).

Each parameter whose noted bytes lie in the store in one run, in its own order, becomes a view of the store. Every other
one gets private memory, and a reason. Tensor objects stay the same objects (`torch.utils.swap_tensors`), so whoever
holds one, under whatever name, has the memory too.
"""

from __future__ import annotations

import gc
import itertools
import sys
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import torch

from ._tensors import strided
from .errors import InvalidReferenceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from .recording import DeferredStorage, NotedCopy, Recording
    from .types import TensorKey

    Private = Callable[[str, torch.nn.Module], str]
    """Why the parameter of that name, in that module, is to have memory of its own; empty where it need not."""

NOT_ADJACENT = "its parts do not lie one behind the other"
NOT_LOADED = "nothing was loaded into it"
_BUFFER = "a buffer, which frameworks write to"
_NOT_A_PARAMETER = "no parameter"
_OF_ANOTHER = "its bytes are those of another parameter, too"
_INITIALISED = "made with values before it was loaded"


class BindingError(InvalidReferenceError, RuntimeError):
    """A module cannot be bound to the store; it must not be used."""


class BoundParameter(NamedTuple):
    """A parameter: its first name, its bytes, and why it is private; empty where it is a view of the store."""

    name: str
    nbytes: int
    reason: str

    @property
    def shared(self) -> bool:
        """Whether it is a view of the store."""
        return not self.reason


class Binding(NamedTuple):
    """What became of a module's parameters; sizes are bytes, and each storage counts once.

    `missing` names parameters and buffers into which nothing was loaded, or only in part: the rest is zeros. `groups`
    are stored tensors that one parameter is made of and that did not lie one behind the other. `objects` is how many
    Python objects were looked at for tensors that no module has; 0 where there was no need to. `places` are address,
    bytes and name of what is shared.
    """

    parameters: tuple[BoundParameter, ...]
    missing: tuple[str, ...]
    groups: tuple[tuple[TensorKey, ...], ...]
    objects: int
    places: tuple[tuple[int, int, str], ...]

    @property
    def shared_bytes(self) -> int:
        """Bytes of parameters that are views of the store."""
        return sum(one.nbytes for one in self.parameters if one.shared)

    @property
    def copied_bytes(self) -> int:
        """Bytes of parameters that are private."""
        return sum(one.nbytes for one in self.parameters if not one.shared)

    def name_at(self, address: int) -> str:
        """The name of the shared parameter that lies at an address; for `Recording.guarding`."""
        at = bisect_right(self.places, (address, sys.maxsize, "")) - 1
        if at < 0 or address >= sum(self.places[at][:2]):
            return "a stored tensor"
        return self.places[at][2]


def bind(module: torch.nn.Module, recording: Recording, *, private: Private = lambda name, owner: "") -> Binding:
    """Give every tensor that the recording left without memory its memory, in a module and wherever else it is held.

    Buffers, plain attributes and the parameters that `private` names, in any module that has them, have memory of their
    own; so do parameters whose noted bytes are no run of the store, or those of another parameter, too. Shared
    parameters need no gradient. Values are those of the engine's own load. Tensors that are held outside of a module's
    parameters and buffers are found by a look at all objects of the interpreter, about 0.3 s for a million; it is left
    out where the module's own tensors are all there are. A stored tensor that the engine keeps as a plain attribute
    stays one.
    Errors: BindingError (a tensor stays without memory), those of `Attachment.span`.
    """
    owners = _owners(module)
    names: dict[DeferredStorage, list[_Owner]] = {}
    for one in owners:
        if (storage := recording.storage_of(one.tensor)) is not None:
            names.setdefault(storage, []).append(one)
    bound = _Bound(recording)
    for storage, some in names.items():
        bound.settle(storage, some, private)
    refused = bound.swap({id(one.tensor): one.tensor for some in names.values() for one in some}.values())
    objects = 0
    if refused or any(storage.used_elsewhere for storage in recording.deferred.values()):
        objects = bound.sweep()
    _require_all(module, recording)
    bound.settle_stored(owners, names, private)
    recording.deferred.clear()  # with the private memory, which whoever replaces a parameter wants back
    return bound.result(module, names, objects)


class _Owner(NamedTuple):
    """A name under which a module has a tensor."""

    name: str
    module: torch.nn.Module
    tensor: torch.Tensor
    is_buffer: bool


def _owners(module: torch.nn.Module) -> list[_Owner]:
    """All parameters and buffers of a module, under their names in each module that has them."""
    found = []
    for prefix, owner in module.named_modules():  # each once: modules may contain each other in a circle
        for tensors, is_buffer in ((owner._parameters, False), (owner._buffers, True)):
            for leaf, tensor in tensors.items():
                if tensor is not None:
                    found.append(_Owner(f"{prefix}.{leaf}" if prefix else leaf, owner, tensor, is_buffer))
    return found


def _reason(owners: Iterable[_Owner], private: Private) -> str:
    """Why a tensor with these names is to have memory of its own; empty where it need not."""
    reasons = (_BUFFER if one.is_buffer else private(one.name, one.module) for one in owners)
    return next(filter(None, reasons), "")


class _Bound:
    """A binding under way."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._shared: set[DeferredStorage] = set()
        self._missing: set[DeferredStorage] = set()
        self._groups: list[tuple[TensorKey, ...]] = []
        self._lent = _Ranges()
        self._made_private: dict[int, str] = {}

    def settle(self, storage: DeferredStorage, owners: list[_Owner], private: Private) -> None:
        """Give a storage that modules use its memory."""
        if storage.memory is not None:  # the engine needed its bytes
            return
        if not storage.copies:
            self._missing.add(storage)
            storage.materialize(NOT_LOADED)
            return
        copies = storage.copies
        run, reason = _run(copies, storage.nbytes)
        if sum(copy.length for copy in copies) < storage.nbytes:
            self._missing.add(storage)
        if reason_to_be_private := _reason(owners, private):
            storage.materialize(reason_to_be_private)
            return
        if run is not None and not self._lent.add(run, storage.nbytes):
            storage.materialize(_OF_ANOTHER)
            return
        memory = None if run is None else self._span(run, storage.nbytes)
        if memory is not None:
            storage.be(memory)
            self._shared.add(storage)
            return
        if not reason or reason == NOT_ADJACENT:
            reason = NOT_ADJACENT
            self._note_group(copies)
        storage.materialize(reason)

    def settle_stored(
        self, owners: Iterable[_Owner], names: Mapping[DeferredStorage, list[_Owner]], private: Private
    ) -> None:
        """Make private copies of stored tensors that the engine has made buffers of, or parameters that are to be."""
        done = {id(one.tensor) for some in names.values() for one in some}
        kept: dict[int, list[_Owner]] = {}
        for one in owners:
            if id(one.tensor) not in done and self._recording.is_stored(one.tensor):
                kept.setdefault(id(one.tensor), []).append(one)
        for some in kept.values():
            tensor = some[0].tensor
            reason = _reason(some, private)
            if not reason and not self._lent.add(tensor.data_ptr(), tensor.nbytes):
                reason = _OF_ANOTHER
            if reason:
                self._made_private[id(tensor)] = reason
                self._swap(tensor, tensor.detach().clone(), tensor.requires_grad)

    def _span(self, address: int, length: int) -> torch.Tensor | None:
        for attachment in self._recording.attachments:
            memory = attachment.span(address, length)
            if memory is not None:
                return strided(memory, torch.uint8, (length,), (1,), attachment.torch_device)
        return None

    def _note_group(self, copies: Iterable[NotedCopy]) -> None:
        """Remember which stored tensors should have lain in a row; only where each is one whole stored tensor."""
        members: list[TensorKey] = []
        for copy in copies:
            places = (attachment.locate(copy.source) for attachment in self._recording.attachments)
            place = next(filter(None, places), None)
            if place is None or len(place.tensors) != 1:
                return
            members.append(place.tensors[0])
        if len(members) > 1 and len(set(members)) == len(members):
            self._groups.append(tuple(members))

    def swap(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Put memory into tensor objects; returns those that refuse, for others are views of them."""
        refused = []
        for tensor in tensors:
            storage = self._recording.storage_of(tensor)
            assert storage is not None
            if storage.memory is None:  # nobody's parameter or buffer
                storage.materialize(NOT_LOADED if not storage.copies else _NOT_A_PARAMETER)
            real = storage.real(tensor)
            gradient = tensor.requires_grad and storage not in self._shared and real.is_floating_point()
            try:
                self._swap(tensor, real, gradient)
            except RuntimeError:
                refused.append(tensor)
        return refused

    def _swap(self, tensor: torch.Tensor, real: torch.Tensor, gradient: bool) -> None:
        """Put memory into a tensor object. Errors: RuntimeError (torch refuses)."""
        new = real if type(tensor) is torch.Tensor else torch.Tensor._make_subclass(type(tensor), real, gradient)
        new.__dict__.update(tensor.__dict__)
        torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]  # torch has no types here

    def sweep(self) -> int:
        """Put memory into every other tensor object of the interpreter that has none; returns how many were looked at.

        Views refuse nothing, so they go first, and then what they were views of. Errors: BindingError.
        """
        objects = gc.get_objects()
        looked = len(objects)
        others = [one for one in objects if issubclass(type(one), torch.Tensor) and self._recording.storage_of(one)]
        del objects
        while others:
            left = self.swap(others)
            if len(left) == len(others):
                raise BindingError(
                    f"{len(left)} parameters without memory cannot be replaced, the first of shape "
                    f"{tuple(left[0].shape)}: the engine keeps weak references to them, or uses them in a graph"
                )
            others = left
        return looked

    def result(self, module: torch.nn.Module, names: dict[DeferredStorage, list[_Owner]], objects: int) -> Binding:
        """What became of each parameter, also of those that had memory from the start."""
        storages = {id(one.tensor): storage for storage, owners in names.items() for one in owners}
        parameters: dict[object, BoundParameter] = {}
        starts = []
        for name, parameter in module.named_parameters():
            storage = storages.get(id(parameter))
            if storage is None:
                stored = self._recording.is_stored(parameter)
                reason = "" if stored else self._made_private.get(id(parameter), _INITIALISED)
                parameters[name] = BoundParameter(name, parameter.nbytes, reason)
                if stored:
                    starts.append((parameter.data_ptr(), parameter.nbytes, name))
            elif storage not in parameters:
                shared = storage in self._shared
                parameters[storage] = BoundParameter(name, storage.nbytes, "" if shared else storage.reason)
                if shared:
                    starts.append((parameter.data_ptr(), storage.nbytes, name))
        missing = tuple(names[storage][0].name for storage in self._missing if storage in names)
        return Binding(tuple(parameters.values()), missing, tuple(self._groups), objects, tuple(sorted(starts)))


class _Ranges:
    """Ranges of addresses that do not overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, length: int) -> bool:
        """Take a range in; false where it overlaps one that is there."""
        at = bisect_right(self._starts, start)
        if (at and self._ends[at - 1] > start) or (at < len(self._starts) and self._starts[at] < start + length):
            return False
        self._starts.insert(at, start)
        self._ends.insert(at, start + length)
        return True


def _run(copies: list[NotedCopy], nbytes: int) -> tuple[int | None, str]:
    """The address at which what was copied lies in the destination's order; else None, and why it does not."""
    end, base, stored = 0, None, sum(copy.length for copy in copies)
    for copy in copies:
        address = copy.source.data_ptr() - copy.start
        if copy.start != end:
            return None, f"only {stored} of its {nbytes} bytes are stored" if stored < nbytes else "it is loaded twice"
        if base is not None and address != base:
            return None, NOT_ADJACENT
        base, end = address, end + copy.length
    if end != nbytes:
        return None, f"only {stored} of its {nbytes} bytes are stored"
    return base, ""


def _require_all(module: torch.nn.Module, recording: Recording) -> None:
    """Errors: BindingError (a tensor is on the meta device still)."""
    every: Iterator[tuple[str, torch.Tensor]] = itertools.chain(module.named_parameters(), module.named_buffers())
    if left := [name for name, tensor in every if tensor.is_meta]:
        raise BindingError(f"{len(left)} tensors have no memory, the first is {left[0]}")
    if unseen := [storage for storage in recording.deferred.values() if storage.used_elsewhere]:
        raise BindingError(
            f"{len(unseen)} tensors without memory are held where Python does not see them, the first of "
            f"{unseen[0].nbytes} bytes"
        )
