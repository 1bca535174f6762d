"""Copying: reads a piece, hashes it while it is in the cache, writes it, and checks whether equal bytes exist.

A piece is read into a buffer of the thread's staging and written from there (devices/segment_io.py): on a GPU while the
next piece is read and hashed.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from weightd import _failpoints
from weightd.errors import FormatError
from weightd_daemon.core.arena import slot_bytes
from weightd_daemon.devices.segment_io import PIECE
from weightd_daemon.libc import equal

from ._proto import loader_pb2 as wire
from .read_ahead import LoaderReadAhead
from .schedule import LoaderTensor, LoaderUnit, batches
from .slots import LoaderSlot, LoaderSlotRow, LoaderSlots

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from weightd_daemon.core.digest import NewHasher
    from weightd_daemon.devices.segment_io import DeviceSegmentIO, DeviceStaging, DeviceStagingBuffer

    from .channel import LoaderChannel
    from .schedule import Lane
    from .source import LoaderSource

_ROW_TENSORS = 4096
"""Tensors of a group that are settled at once: it is one message, which the daemon answers in one step."""

_SETTLED_TENSORS = 1000
"""Other tensors that are settled at once: a piece may hold a million."""

Read = Callable[["DeviceStagingBuffer", int, int], None]
"""Fills the first `size` bytes of a buffer from a position on; done when the thread's staging is synchronized."""

Copied = tuple[LoaderTensor, bytes, LoaderSlot]
"""A tensor whose bytes, of that digest, lie in a slot."""


def pieces(length: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of the pieces of `length` bytes."""
    for offset in range(0, length, PIECE):
        yield offset, min(PIECE, length - offset)


class LoaderCopier:
    """Copies a load's tensors into segments on a few threads. `digests` are known if all was hashed before."""

    def __init__(
        self,
        channel: LoaderChannel,
        io: DeviceSegmentIO,
        sources: list[LoaderSource],
        new_hasher: NewHasher,
        *,
        digests: dict[int, bytes] | None = None,
        matched: frozenset[int] = frozenset(),
        lanes: Iterable[Lane] = (),
    ) -> None:
        self._channel = channel
        self._io = io
        self._sources = sources
        self._new_hasher = new_hasher
        self._reading = LoaderReadAhead(sources)
        self._digests = digests or {}
        self._matched = matched
        self._slots: dict[int, LoaderSlots] = {}
        self._together: dict[int, LoaderSlotRow] = {}
        self._rows: dict[int, _Row] = {}
        for lane in lanes:
            sizes: list[int] = []
            for batch in batches(lane):
                tensors = [tensor for unit in batch for tensor in unit.tensors]
                new = [tensor for tensor in tensors if tensor.number not in matched]
                sizes.append(_slot_bytes(new))
                group = batch[0].group
                if group is not None and len(new) == len(tensors):
                    self._together.update(dict.fromkeys((tensor.number for tensor in new), LoaderSlotRow(sizes[-1])))
                    if digests is None and len(new) <= _ROW_TENSORS:
                        self._rows[group] = _Row(len(new))
            slots = LoaderSlots(
                channel, sizes, frugal=digests is not None
            )  # hashed before: only what is new was promised
            self._slots.update(dict.fromkeys((tensor.number for unit in lane for tensor in unit.tensors), slots))
        self._reserved: dict[int, LoaderSlot] = {}
        self._local = threading.local()
        self._stagings: list[DeviceStaging] = []

    def close(self) -> None:
        """Give every thread's buffers up; the threads have ended. Errors: DeviceError."""
        with contextlib.ExitStack() as stack:
            while self._stagings:
                stack.callback(self._stagings.pop().close)

    def expect(self, rows: Iterable[Iterable[LoaderUnit]]) -> None:
        """From now on the units of these rows are read, each row about in its order: what follows is read ahead."""
        self._reading = LoaderReadAhead(self._sources, rows)

    def reserve(self, unit: LoaderUnit) -> None:
        """Take the slots of a unit. Called in the units' order, so that extents are filled without a rest."""
        for run in _runs(tuple(tensor for tensor in unit.tensors if tensor.number not in self._matched)):
            number = run[0].number
            self._reserved[number] = self._slots[number].allocate(_slot_bytes(run), self._together.get(number))

    def copy(self, unit: LoaderUnit) -> None:
        """Deal with one unit: afterwards each of its tensors has a blob."""
        _failpoints.reach("loader.copy")
        rest = [tensor for tensor in unit.tensors if not self._compare_first(tensor)]
        if len(rest) == 1:
            self._copy_one(rest[0])
        elif rest:
            self._copy_group(LoaderUnit(unit.file, tuple(rest)))

    def hash(self, unit: LoaderUnit) -> list[tuple[int, bytes]]:
        """Only hash a unit. Returns (index, digest) of each tensor."""
        staging = self._staging()
        buffer = staging.acquire()
        found = []
        for tensor in unit.tensors:
            hasher = self._new_hasher()
            for offset, size in pieces(tensor.spec.length):
                self._reading.read_into(buffer.view[:size], tensor, offset)
                hasher.update(buffer.view[:size])
            found.append((tensor.number, hasher.digest()))
        staging.put_back(buffer)
        return found

    def recheck(self, length: int, first: LoaderSlot, second: LoaderSlot) -> bool:
        """Whether two runs of resident bytes are equal."""
        return self._equal(length, self._resident(first.segment, first.offset), second.segment, second.offset)

    # -- one large tensor, piece by piece --------------------------------------------------------------------------

    def _copy_one(self, tensor: LoaderTensor) -> None:
        staging, slot = self._staging(), self._slot([tensor])
        hasher = self._new_hasher()
        for offset, size in pieces(tensor.spec.length):
            buffer = staging.acquire()
            self._reading.read_into(buffer.view[:size], tensor, offset)
            hasher.update(buffer.view[:size])
            staging.write(buffer, size, slot.segment, slot.offset + offset)
        staging.synchronize()
        digest = self._checked(tensor, hasher.digest())
        self._settle_in_rows(tensor.group, [(tensor, digest, slot)])

    # -- neighbours that fit into one piece: one read, one write, one question ---------------------------------------

    def _copy_group(self, unit: LoaderUnit) -> None:
        staging = self._staging()
        whole = staging.acquire()
        self._reading.read_into(whole.view[: unit.end - unit.start], unit.tensors[0])
        found: list[Copied] = []
        for run in _runs(unit.tensors):
            slot = self._slot(run)
            packed, position = staging.acquire(), 0
            for tensor in run:
                start = tensor.spec.offset - unit.start
                view = whole.view[start : start + tensor.spec.length]
                hasher = self._new_hasher()
                hasher.update(view)
                packed.view[position : position + len(view)] = view
                size = slot_bytes(len(view))
                place = LoaderSlot(slot.segment, slot.offset + position, size)
                found.append((tensor, self._checked(tensor, hasher.digest()), place))
                position += size
            staging.write(packed, position, slot.segment, slot.offset)
        staging.put_back(whole)
        staging.synchronize()
        self._settle_in_rows(unit.group, found)

    def _slot(self, run: list[LoaderTensor]) -> LoaderSlot:
        """The slot that was reserved for a run, or another where a comparison has changed what has to be copied."""
        slots, size = self._slots[run[0].number], _slot_bytes(run)
        reserved = self._reserved.pop(run[0].number, None)
        if reserved is not None and reserved.size == size:
            return reserved
        if reserved is not None:
            slots.give_back(reserved)
        return slots.allocate(size)

    # -- finding equal bytes -----------------------------------------------------------------------------------------

    def _settle_in_rows(self, group: int | None, found: list[Copied]) -> None:
        """Settle what was copied; of a group, only when all of it is there, and then all at once.

        Where a checkpoint has two rows of equal bytes, threads copy them side by side. If each tensor were settled by
        itself, each row could give way to the other in part, and neither would be left in one piece.
        """
        row = self._rows.get(group) if group is not None else None
        if row is not None:
            if whole := row.add(found):
                self._settle(whole)
            return
        for start in range(0, len(found), _SETTLED_TENSORS):
            self._settle(found[start : start + _SETTLED_TENSORS])

    def _settle(self, found: list[Copied]) -> None:
        """Ask what lies there under these digests, compare, and share or keep, until each tensor has its blob."""
        differs: dict[int, list[int]] = {tensor.number: [] for tensor, _, _ in found}
        while found:
            others = [differs[tensor.number] for tensor, _, _ in found]
            question = wire.Settle(
                tensors=[tensor.number for tensor, _, _ in found],
                digests=b"".join(digest for _, digest, _ in found),
                segments=[slot.segment for _, _, slot in found],
                offsets=[slot.offset for _, _, slot in found],
                differences=[len(blobs) for blobs in others],
                differing=itertools.chain(*others),
            )
            answer = self._channel.call(wire.ToDaemon(settle=question)).settle
            candidates = zip(answer.found, answer.blobs, answer.segments, answer.offsets, strict=True)
            again: list[Copied] = []
            same: list[tuple[LoaderTensor, LoaderSlot, int]] = []
            for (tensor, digest, slot), (there, blob, segment, offset) in zip(found, candidates, strict=True):
                if not there:
                    continue  # placed: these bytes are a new blob
                if self._equal(tensor.spec.length, self._resident(slot.segment, slot.offset), segment, offset):
                    same.append((tensor, slot, blob))
                else:
                    differs[tensor.number].append(blob)
                    again.append((tensor, digest, slot))
            if same:
                shares = wire.Share(
                    tensors=[tensor.number for tensor, _, _ in same],
                    blobs=[blob for _, _, blob in same],
                    segments=[slot.segment for _, slot, _ in same],
                    offsets=[slot.offset for _, slot, _ in same],
                )
                uses = self._channel.call(wire.ToDaemon(share=shares)).share.uses
                for (tensor, slot, _), use in zip(same, uses, strict=True):
                    if use != wire.USE_SLOT:
                        self._slots[tensor.number].give_back(slot)
                        if (together := self._together.get(tensor.number)) is not None:
                            together.apart = True
            found = again

    def _compare_first(self, tensor: LoaderTensor) -> bool:
        """Where the digest is known to have a candidate: compare with the file itself, so that no memory is needed.

        Nothing is hashed again: bytes that equal a candidate's have its digest.
        """
        if tensor.number not in self._matched:
            return False
        digest = self._digests[tensor.number]

        def read(buffer: DeviceStagingBuffer, size: int, position: int) -> None:
            self._reading.read_into(buffer.view[:size], tensor, position)

        question = wire.Candidate(tensor=tensor.number, digest=digest)
        answer = self._channel.call(wire.ToDaemon(candidate=question)).candidate
        ((there, blob, segment, offset),) = zip(
            answer.found, answer.blobs, answer.segments, answer.offsets, strict=True
        )
        if not there or not self._equal(tensor.spec.length, read, segment, offset):
            return False
        share = wire.Share(tensors=[tensor.number], blobs=[blob])
        (use,) = self._channel.call(wire.ToDaemon(share=share)).share.uses
        return use == wire.USE_BLOB

    def _equal(self, length: int, read: Read, segment: int, offset: int) -> bool:
        """Compare `length` bytes that `read` delivers with resident ones, piece by piece, with libc's memcmp."""
        staging, resident = self._staging(), self._resident(segment, offset)
        mine, theirs = staging.acquire(), staging.acquire()
        same = True
        for position, size in pieces(length):
            resident(theirs, size, position)
            read(mine, size, position)
            staging.synchronize()
            if not equal(mine.address, theirs.address, size):
                same = False
                break
        staging.put_back(mine)
        staging.put_back(theirs)
        return same

    def _resident(self, segment: int, offset: int) -> Read:
        staging = self._staging()
        return lambda buffer, size, position: staging.read(buffer, size, segment, offset + position)

    def _checked(self, tensor: LoaderTensor, digest: bytes) -> bytes:
        known = self._digests.get(tensor.number)
        if known is not None and known != digest:
            name = self._sources[tensor.file].name
            raise FormatError(f"{name}: changed while it was read (tensor {tensor.spec.name!r}); load it again")
        return digest

    def _staging(self) -> DeviceStaging:
        """The calling thread's buffers."""
        if not hasattr(self._local, "staging"):
            self._local.staging = self._io.staging()
            self._stagings.append(self._local.staging)
        staging: DeviceStaging = self._local.staging
        return staging


class _Row:
    """What was copied of a group of `count` tensors and is not settled yet."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._found: list[Copied] = []
        self._adding = threading.Lock()

    def add(self, found: list[Copied]) -> list[Copied]:
        """Take in what was copied. Returns all of the group with its last tensor, else nothing."""
        with self._adding:
            self._found += found
            return self._found if len(self._found) == self._count else []


def _slot_bytes(run: Iterable[LoaderTensor]) -> int:
    return sum(slot_bytes(tensor.spec.length) for tensor in run)


def _runs(tensors: tuple[LoaderTensor, ...]) -> Iterator[list[LoaderTensor]]:
    """Cut a group so that each run, aligned, fits into one buffer."""
    run: list[LoaderTensor] = []
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
