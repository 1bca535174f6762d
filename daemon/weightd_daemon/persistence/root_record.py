"""The root record: the part of the daemon's state that survives a restart, as a log in a kept memfd.

The memfd has two slots, and one of them counts. A slot is a run of frames: a *base*, which sets every row, a frame that
says that the base is whole, and then one frame for each change. A change costs its own bytes, however many rows there
are. When the changes have outgrown the base, another base is begun in the other slot, and is copied a few rows with
each change; when it is whole it counts, and the slot before it is emptied.

A frame is a header (magic, schema, kind, generation, number, length, SHA-256 over the frame before, all of these and
the payload) and a payload, which is JSON. So a write that a kill has torn, at any byte, leaves the state before it: the
frame is not valid, and the log ends there. The whole slot of the greater generation counts. What is in the rows is
checked by those who read them (restore.py).

The first form, as of commit cf42aab, is still read: a slot has one JSON document, written anew at each change.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd import _failpoints
from weightd_daemon.libc import punch_hole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SCHEMA = 1
"""Of the rows. Raised when they mean something else to a daemon that does not know it."""

SLOT_BYTES = 256 << 20
"""From one slot to the next. The memfd is sparse: it takes memory for what is written."""

TABLES = ("segments", "checkpoints", "names")

_FIRST_FORM = b"weightd\x01"
_FIRST_HEADER = struct.Struct("<8sIQQ32s")
_MAGIC = b"weightd\x02"
_HEADER = struct.Struct("<8sIIQQQ32s")
_ROWS, _WHOLE = 1, 2
"""Kinds of frames: rows to set, change or delete; and that the base ends here."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_encode = json.JSONEncoder(separators=(",", ":")).encode

_LEAST_LOG = 64 << 10
"""Bytes of changes that no new base is begun for."""
_COPIED_LEAST, _COPIED_TIMES = 2048, 3
"""Bytes of a new base that are copied with each change: so many, and so many times the change's."""


class RootRecordContents(NamedTuple):
    """What a root record says: the schema of its rows, its generation, its tables and counters."""

    schema: int
    sequence: int
    body: dict[str, Any]


class RootRecordChange(NamedTuple):
    """Change of one row of the root record: its new values, or None to delete it. With `merge` it keeps its others."""

    table: str
    key: int | str
    row: Mapping[str, Any] | None
    merge: bool = False


class PersistentRootRecord:
    """Root record being written, a memfd that survives the daemon. `sequence` is the valid slot's number."""

    def __init__(self, descriptor: int, sequence: int = 0) -> None:
        self.descriptor = descriptor
        self.sequence = sequence
        self._log: _Log | None = None
        self._next: _Log | None = None

    @classmethod
    def create(cls) -> PersistentRootRecord:
        """A new one, without content. Errors: OSError."""
        descriptor = os.memfd_create("weightd-root", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, 2 * SLOT_BYTES)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            os.fchmod(descriptor, 0o600)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    @property
    def outgrown(self) -> bool:
        """Whether a new base should be begun."""
        log = self._log
        return self._next is None and log is not None and log.bytes - log.base > max(_LEAST_LOG, log.base)

    def write(self, rows: Iterable[RootRecordChange], counters: Mapping[str, int]) -> None:
        """Write a base at once, in the other slot: until it is whole the slot before counts.

        Errors: OSError; then no slot counts any more, for what was there may be something else since.
        """
        try:
            self.begin_base()
            assert self._next is not None  # begun
            for some in _portions(rows, 1 << 20):
                self._next.append(_ROWS, _payload(some, counters))
            self.end_base(counters)
        except OSError:
            self.clear()
            raise

    def append(self, rows: Iterable[RootRecordChange], counters: Mapping[str, int]) -> int:
        """Write one change: all of these rows and counters hold from now on, or none where a kill comes before.

        Returns how many bytes of a new base should be copied with it; 0 where none is under way. A base must have been
        written. Errors: OSError; then the state before this change counts, or the one after it, until `write` is
        called, which must be next. The same goes for `copy` and `end_base`.
        """
        assert self._log is not None  # of `write`
        payload = _payload(map(_encode, rows), counters)
        self._log.append(_ROWS, payload)
        if self._next is None:
            return 0
        self._next.append(_ROWS, payload)
        return _COPIED_LEAST + _COPIED_TIMES * len(payload)

    def begin_base(self) -> None:
        """Begin a base in the slot that does not count. What is appended from now on goes to both slots.

        Errors: OSError.
        """
        _empty(self.descriptor, self.sequence + 1)
        self._next = _Log(self.descriptor, self.sequence + 1)

    def copy(self, rows: Iterable[RootRecordChange], counters: Mapping[str, int], most: int) -> bool:
        """Copy rows into the base that was begun, until they are `most` bytes. Returns whether no row was left.

        Errors: OSError, as of `append`.
        """
        assert self._next is not None  # begun
        some = next(_portions(rows, most), None)
        if some is None:
            return True
        self._next.append(_ROWS, _payload(some, counters))
        return False

    def end_base(self, counters: Mapping[str, int]) -> None:
        """The base is whole, and counts. Errors: OSError, as of `append`."""
        assert self._next is not None  # begun
        self._next.append(_WHOLE, _payload((), counters))
        self._next.base = self._next.bytes
        self.sequence, self._log, self._next = self._next.generation, self._next, None
        _empty(self.descriptor, self.sequence + 1)

    def clear(self) -> None:
        """Have neither slot count any more; a base must be written before the next change.

        It takes no memory, for there may be none. Errors: OSError.
        """
        self._log = self._next = None
        with contextlib.ExitStack() as both:  # the second one is emptied whatever comes of the first
            for generation in (self.sequence + 1, self.sequence):
                both.callback(_empty, self.descriptor, generation)

    def close(self) -> None:
        """Close the descriptor; other descriptors of the memfd keep the record."""
        os.close(self.descriptor)


class _Log:
    """The frames of one slot, as they are written."""

    def __init__(self, descriptor: int, generation: int) -> None:
        self.generation = generation
        self.bytes = 0
        self.base = 0
        """How many of them are the base."""
        self._descriptor = descriptor
        self._number = 0
        self._before = b""

    def append(self, kind: int, payload: bytes) -> None:
        """Write the next frame. Errors: OSError."""
        header = _header(SCHEMA, kind, self.generation, self._number, payload, self._before)
        if self.bytes + len(header) + len(payload) > SLOT_BYTES:
            raise OSError(f"{self.bytes + len(payload)} bytes are too many")
        _failpoints.reach("flip.write")
        _write(self._descriptor, header + payload, _start(self.generation) + self.bytes)
        _failpoints.reach("flip.written")
        self.bytes += len(header) + len(payload)
        self._number += 1
        self._before = header[-hashlib.sha256().digest_size :]


def read_root(descriptor: int) -> RootRecordContents | None:
    """What a root record says: the state after the last change that was written whole. None where it says nothing."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != 2 * SLOT_BYTES:
            return None
        found = [
            record
            for slot in (0, 1)
            if (record := _read_log(descriptor, slot) or _read_first_form(descriptor, slot)) is not None
        ]
    except OSError:
        return None
    return max(found, key=lambda record: record.sequence, default=None)


def _read_log(descriptor: int, slot: int) -> RootRecordContents | None:
    at, before, number, whole = 0, b"", 0, False
    meant: tuple[int, int] | None = None
    tables: dict[str, dict[int | str, dict[str, Any]]] = {table: {} for table in TABLES}
    counters: dict[str, Any] = {}
    while at + _HEADER.size <= SLOT_BYTES:
        header = os.pread(descriptor, _HEADER.size, slot * SLOT_BYTES + at)
        magic, schema, kind, generation, stands, length, digest = _HEADER.unpack(header)
        if magic != _MAGIC or stands != number or generation % 2 != slot or at + _HEADER.size + length > SLOT_BYTES:
            break
        meant = meant or (schema, generation)
        payload = os.pread(descriptor, length, slot * SLOT_BYTES + at + _HEADER.size)
        if meant != (schema, generation) or header != _header(schema, kind, generation, number, payload, before):
            break
        if not _apply(payload, tables, counters):
            return None
        whole = whole or kind == _WHOLE
        at, before, number = at + _HEADER.size + length, digest, number + 1
    if not whole or meant is None:
        return None
    return RootRecordContents(*meant, {**counters, **{table: list(rows.values()) for table, rows in tables.items()}})


def _apply(payload: bytes, tables: dict[str, dict[int | str, dict[str, Any]]], counters: dict[str, Any]) -> bool:
    """Do what a frame says. Returns False where that cannot be understood: what comes after it cannot be, either."""
    try:
        said = json.loads(payload)
        counters.update(said["counters"])
        for table, key, row, merge in said["rows"]:
            rows = tables.setdefault(table, {})
            if row is None:
                rows.pop(key, None)
            elif not merge:
                rows[key] = dict(row)
            elif key in rows:
                rows[key].update(row)
    except (ValueError, RecursionError, TypeError, KeyError):
        return False
    return True


def _read_first_form(descriptor: int, slot: int) -> RootRecordContents | None:
    header = os.pread(descriptor, _FIRST_HEADER.size, slot * SLOT_BYTES)
    magic, schema, sequence, length, digest = _FIRST_HEADER.unpack(header)
    if magic != _FIRST_FORM or length > SLOT_BYTES - _FIRST_HEADER.size or sequence % 2 != slot:
        return None
    payload = os.pread(descriptor, length, slot * SLOT_BYTES + _FIRST_HEADER.size)
    said = hashlib.sha256(struct.pack("<IQQ", schema, sequence, len(payload)))
    said.update(payload)
    if len(payload) != length or said.digest() != digest:
        return None
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return RootRecordContents(schema, sequence, body) if isinstance(body, dict) else None


def _start(generation: int) -> int:
    return generation % 2 * SLOT_BYTES


def _header(schema: int, kind: int, generation: int, number: int, payload: bytes, before: bytes) -> bytes:
    digest = hashlib.sha256(before)
    digest.update(struct.pack("<IIQQQ", schema, kind, generation, number, len(payload)))
    digest.update(payload)
    return _HEADER.pack(_MAGIC, schema, kind, generation, number, len(payload), digest.digest())


def _payload(rows: Iterable[str], counters: Mapping[str, int]) -> bytes:
    return f'{{"counters":{_encode(counters)},"rows":[{",".join(rows)}]}}'.encode()


def _portions(rows: Iterable[RootRecordChange], most: int) -> Iterator[list[str]]:
    """Rows, encoded, in lists of at least `most` bytes. Of an iterator, what is not asked for is left."""
    some: list[str] = []
    size = 0
    for row in rows:
        some.append(_encode(row))
        size += len(some[-1])
        if size >= most:
            yield some
            some, size = [], 0
    if some:
        yield some


def _empty(descriptor: int, generation: int) -> None:
    """Give a slot's memory back: it reads as zeros, and does not count.

    Without a mapping of Python's, which takes a descriptor: when none is left, a slot that lies must go all the same.
    """
    punch_hole(descriptor, _start(generation), SLOT_BYTES)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
