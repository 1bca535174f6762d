"""The root record: what of the books outlives the daemon, in a memfd that the service manager keeps.

It has two slots, written in turn and in place. A slot is a header (magic, schema, sequence number, length, SHA-256 over
all of that and the payload) and the payload, which is JSON. The valid slot with the greater sequence number counts: a
write that a kill has torn leaves the one before. What is in it is checked by whoever reads it (restore.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import struct
from typing import Any, NamedTuple

SCHEMA = 1
"""Raised when what is written here means something else to a daemon that does not know it."""

SLOT_BYTES = 256 << 20
"""From one slot to the next. The memfd is sparse: it takes memory for what is written."""

_MAGIC = b"weightd\x01"
_HEADER = struct.Struct("<8sIQQ32s")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Record(NamedTuple):
    """What a slot holds."""

    schema: int
    sequence: int
    body: dict[str, Any]


class RootRecord:
    """A root record that is written to. It owns the descriptor of its memfd."""

    def __init__(self, descriptor: int, sequence: int = 0) -> None:
        self.descriptor = descriptor
        self.sequence = sequence

    @classmethod
    def create(cls) -> RootRecord:
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

    def write(self, body: dict[str, Any]) -> None:
        """Write the next content, beside the last. Errors: OSError; then neither slot counts any more.

        For what was there may have been evicted since, and its memory be used for something else.
        """
        payload = json.dumps(body, separators=(",", ":")).encode()
        self.sequence += 1
        try:
            if _HEADER.size + len(payload) > SLOT_BYTES:
                raise OSError(f"{len(payload)} bytes are too many")
            _write(self.descriptor, _header(SCHEMA, self.sequence, payload) + payload, _start(self.sequence))
        except OSError:
            self.clear()
            raise

    def clear(self) -> None:
        """Have neither slot count any more. Errors: OSError."""
        for slot in (0, 1):
            _write(self.descriptor, bytes(_HEADER.size), _start(slot))

    def close(self) -> None:
        """Close the descriptor; whoever else has one keeps the record."""
        os.close(self.descriptor)


def read_root(descriptor: int) -> Record | None:
    """The content of a root record, the last that was written whole; None where there is none."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != 2 * SLOT_BYTES:
            return None
        found = [record for slot in (0, 1) if (record := _read(descriptor, slot)) is not None]
    except OSError:
        return None
    return max(found, key=lambda record: record.sequence, default=None)


def _read(descriptor: int, slot: int) -> Record | None:
    header = os.pread(descriptor, _HEADER.size, _start(slot))
    magic, schema, sequence, length, _ = _HEADER.unpack(header)
    if magic != _MAGIC or length > SLOT_BYTES - _HEADER.size or sequence % 2 != slot:
        return None
    payload = os.pread(descriptor, length, _start(slot) + _HEADER.size)
    if header != _header(schema, sequence, payload):
        return None
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return Record(schema, sequence, body) if isinstance(body, dict) else None


def _start(sequence: int) -> int:
    return sequence % 2 * SLOT_BYTES


def _header(schema: int, sequence: int, payload: bytes) -> bytes:
    digest = hashlib.sha256(struct.pack("<IQQ", schema, sequence, len(payload)))
    digest.update(payload)
    return _HEADER.pack(_MAGIC, schema, sequence, len(payload), digest.digest())


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
