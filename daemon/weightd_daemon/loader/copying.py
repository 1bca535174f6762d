"""Copying: read a piece, hash it while it is in cache, write it, and find out whether the bytes are there already.

Pieces go through a bounce buffer of 1 MiB: measured, page allocation is what filling a fresh memfd costs, a copy that
stays in the cache costs nothing beside it, and `pwrite` into memory that is populated already runs at memory speed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import TYPE_CHECKING

from weightd.errors import FormatError
from weightd_daemon.core.arena import slot_bytes

from .slots import Slot, Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from weightd_daemon.core.digest import NewHasher

    from .channel import Channel
    from .source import Source
    from .work import Lane
from .target import Target, huge_pages_by_advice
from .work import PIECE, Tensor, Unit

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Buffer:
    """A page-aligned bounce buffer of one piece."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


def pieces(length: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of the pieces of `length` bytes."""
    for offset in range(0, length, PIECE):
        yield offset, min(PIECE, length - offset)


class Copier:
    """Deals with every tensor of a load on a few threads. `digests` are known when everything was hashed before."""

    def __init__(
        self,
        channel: Channel,
        sources: list[Source],
        new_hasher: NewHasher,
        *,
        digests: dict[int, bytes] | None = None,
        matched: frozenset[int] = frozenset(),
        lanes: Iterable[Lane] = (),
    ) -> None:
        self._channel = channel
        self._sources = sources
        self._new_hasher = new_hasher
        self._digests = digests or {}
        self._matched = matched
        self._slots: dict[int, Slots] = {}
        for lane in lanes:
            new = [[tensor for tensor in unit.tensors if tensor.number not in matched] for unit in lane]
            slots = Slots(channel, [sum(slot_bytes(tensor.spec.length) for tensor in unit) for unit in new])
            self._slots.update(dict.fromkeys((tensor.number for unit in lane for tensor in unit.tensors), slots))
        self._target = Target(channel.segments, by_mapping=huge_pages_by_advice())
        self._local = threading.local()

    def copy(self, unit: Unit) -> None:
        """Deal with one unit: afterwards each of its tensors has a blob."""
        rest = [tensor for tensor in unit.tensors if not self._compare_first(tensor)]
        if len(rest) == 1:
            self._copy_one(rest[0])
        elif rest:
            self._copy_group(Unit(unit.file, tuple(rest)))

    def hash(self, unit: Unit) -> list[tuple[int, bytes]]:
        """Only hash a unit. Returns (index, digest) of each tensor."""
        source, buffer = self._sources[unit.file], self._buffers()[0]
        found = []
        for tensor in unit.tensors:
            hasher = self._new_hasher()
            for offset, size in pieces(tensor.spec.length):
                source.read_into(buffer.view[:size], tensor.spec.offset + offset)
                hasher.update(buffer.view[:size])
            found.append((tensor.number, hasher.digest()))
        return found

    def recheck(self, length: int, first: Slot, second: Slot) -> bool:
        """Whether two runs of resident bytes are equal."""
        return self._equal(length, self._resident(first.segment, first.offset), second.segment, second.offset)

    # -- one large tensor, piece by piece --------------------------------------------------------------------------

    def _copy_one(self, tensor: Tensor) -> None:
        source, slots, buffer = self._sources[tensor.file], self._slots[tensor.number], self._buffers()[0]
        slot = slots.take(tensor.spec.length)
        hasher = self._new_hasher()
        for offset, size in pieces(tensor.spec.length):
            view = buffer.view[:size]
            source.read_into(view, tensor.spec.offset + offset)
            hasher.update(view)
            self._target.write(slot.segment, view, buffer.address, slot.offset + offset)
        digest = self._checked(tensor, hasher.digest())
        self._settle([(tensor, digest, slot)])

    # -- neighbours that fit into one piece: one read, one write, one question ---------------------------------------

    def _copy_group(self, unit: Unit) -> None:
        source, slots = self._sources[unit.file], self._slots[unit.tensors[0].number]
        whole, packed = self._buffers()
        first, last = unit.tensors[0].spec, unit.tensors[-1].spec
        span = last.offset + last.length - first.offset
        source.read_into(whole.view[:span], first.offset)
        found: list[tuple[Tensor, bytes, Slot]] = []
        for run in _runs(unit.tensors):
            slot = slots.take(sum(slot_bytes(tensor.spec.length) for tensor in run))
            position = 0
            for tensor in run:
                start = tensor.spec.offset - first.offset
                view = whole.view[start : start + tensor.spec.length]
                hasher = self._new_hasher()
                hasher.update(view)
                packed.view[position : position + len(view)] = view
                size = slot_bytes(len(view))
                place = Slot(slot.segment, slot.offset + position, size)
                found.append((tensor, self._checked(tensor, hasher.digest()), place))
                position += size
            self._target.write(slot.segment, packed.view[:position], packed.address, slot.offset)
        self._settle(found)

    # -- finding equal bytes -----------------------------------------------------------------------------------------

    def _settle(self, found: list[tuple[Tensor, bytes, Slot]]) -> None:
        """Ask what lies there under these digests, compare, and share or keep, until each tensor has its blob."""
        differs: dict[int, list[int]] = {tensor.number: [] for tensor, _, _ in found}
        while found:
            items = [
                (tensor.number, digest.hex(), slot.segment, slot.offset, differs[tensor.number])
                for tensor, digest, slot in found
            ]
            answers = self._channel.call("settle", items=items)["answers"]
            again, equal = [], []
            for (tensor, digest, slot), answer in zip(found, answers, strict=True):
                if answer is None:
                    continue  # placed: these bytes are a new blob
                blob, segment, offset = answer
                if self._equal(tensor.spec.length, self._resident(slot.segment, slot.offset), segment, offset):
                    equal.append((tensor, slot, blob))
                else:
                    differs[tensor.number].append(blob)
                    again.append((tensor, digest, slot))
            if equal:
                shares = [(tensor.number, blob, slot.segment, slot.offset) for tensor, slot, blob in equal]
                kept = self._channel.call("share", items=shares)["kept"]
                for (tensor, slot, _), stays in zip(equal, kept, strict=True):
                    if not stays:
                        self._slots[tensor.number].give_back(slot)
            found = again

    def _compare_first(self, tensor: Tensor) -> bool:
        """Where the digest is known to have a candidate: compare with the file itself, so that no memory is needed."""
        if tensor.number not in self._matched:
            return False
        source, spec = self._sources[tensor.file], tensor.spec
        digest = self._digests[tensor.number]
        hasher = self._new_hasher()

        def read(view: memoryview, offset: int) -> None:
            source.read_into(view, spec.offset + offset)
            hasher.update(view)

        answer = self._channel.call("candidate", index=tensor.number, digest=digest.hex())
        if "blob" not in answer:
            return False
        if not self._equal(spec.length, read, answer["segment"], answer["offset"]):
            return False
        self._checked(tensor, hasher.digest())
        share = (tensor.number, answer["blob"], None, 0)
        return bool(self._channel.call("share", items=[share])["kept"][0] is False)

    def _equal(self, length: int, read: Callable[[memoryview, int], None], segment: int, offset: int) -> bool:
        """Compare `length` bytes that `read` delivers with resident ones, piece by piece, with libc's memcmp."""
        mine, theirs = self._buffers()
        resident = self._resident(segment, offset)
        for position, size in pieces(length):
            read(mine.view[:size], position)
            resident(theirs.view[:size], position)
            if _libc.memcmp(mine.address, theirs.address, size):
                return False
        return True

    def _resident(self, segment: int, offset: int) -> Callable[[memoryview, int], None]:
        descriptor = self._channel.segments[segment]

        def read(view: memoryview, position: int) -> None:
            if os.preadv(descriptor, [view], offset + position) != len(view):
                raise OSError(f"segment {segment} is shorter than its books")

        return read

    def _checked(self, tensor: Tensor, digest: bytes) -> bytes:
        known = self._digests.get(tensor.number)
        if known is not None and known != digest:
            name = self._sources[tensor.file].name
            raise FormatError(f"{name}: changed while it was read (tensor {tensor.spec.name!r}); load it again")
        return digest

    def _buffers(self) -> tuple[Buffer, Buffer]:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffer(), Buffer()
        buffers: tuple[Buffer, Buffer] = self._local.buffers
        return buffers


def _runs(tensors: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
    """Cut a group so that each run, aligned, fits into one buffer."""
    run: list[Tensor] = []
    size = 0
    for tensor in tensors:
        slot = slot_bytes(tensor.spec.length)
        if run and size + slot > PIECE:
            yield run
            run, size = [], 0
        run.append(tensor)
        size += slot
    if run:
        yield run
