"""The root record: what a kill leaves of it, at every byte, is the record before or the one after."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from weightd_daemon.persistence import root_record
from weightd_daemon.persistence.root_record import SLOT_BYTES, RootRecord, read_root

BODIES = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=50), max_size=4)
HEADER = root_record._HEADER.size


@pytest.fixture
def root() -> Iterator[RootRecord]:
    made = RootRecord.create()
    yield made
    made.close()


def body_of(root: RootRecord) -> dict[str, Any] | None:
    record = read_root(root.descriptor)
    return None if record is None else record.body


def slot(root: RootRecord, number: int, length: int = 4096) -> bytes:
    return os.pread(root.descriptor, length, number * SLOT_BYTES)


def test_the_last_that_was_written_counts_and_takes_memory_for_what_it_is(root: RootRecord) -> None:
    assert body_of(root) is None
    for number in range(5):
        root.write({"number": number})
        assert body_of(root) == {"number": number}
    record = read_root(root.descriptor)
    assert record is not None
    assert (record.schema, record.sequence) == (root_record.SCHEMA, 5)
    assert os.fstat(root.descriptor).st_blocks * 512 <= 2 * 2 << 20  # a huge page for each slot at most
    again = RootRecord(os.dup(root.descriptor), record.sequence)
    again.write({"number": "by the next daemon"})
    again.close()
    assert body_of(root) == {"number": "by the next daemon"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.lists(BODIES, max_size=3), after=BODIES, at=st.data())
def test_a_torn_write_leaves_the_one_before(
    root: RootRecord, before: list[dict[str, Any]], after: dict[str, Any], at: st.DataObject
) -> None:
    last = body_of(root)
    for body in before:
        root.write(body)
        last = body
    number = (root.sequence + 1) % 2
    old = slot(root, number, 64 << 10)
    root.write(after)
    new = slot(root, number, 64 << 10)
    differs = [position for position in range(len(new)) if old[position] != new[position]]
    for cut in {at.draw(st.integers(0, len(new))) for _ in range(8)} | {differs[0], differs[-1], HEADER}:
        os.pwrite(root.descriptor, new[:cut] + old[cut:], number * SLOT_BYTES)
        assert body_of(root) == (after if cut > differs[-1] else last)
    os.pwrite(root.descriptor, new, number * SLOT_BYTES)


def test_every_byte_of_a_slot_is_covered(root: RootRecord) -> None:
    root.write({"a": 1})
    root.write({"b": 2})
    whole = slot(root, 0, HEADER + len(b'{"b":2}'))
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        os.pwrite(root.descriptor, changed, 0)
        assert body_of(root) == {"a": 1}, position
    os.pwrite(root.descriptor, whole, 0)
    os.pwrite(root.descriptor, b"\xff" * 4096, SLOT_BYTES)
    assert body_of(root) == {"b": 2}
    os.pwrite(root.descriptor, b"\xff" * 4096, 0)
    assert body_of(root) is None


def test_a_slot_counts_in_its_own_place_only(root: RootRecord) -> None:
    """What lies in the other slot would be overwritten by the next write, and is the only one then."""
    root.write({"a": 1})
    os.pwrite(root.descriptor, slot(root, 1), 0)
    os.pwrite(root.descriptor, bytes(4096), SLOT_BYTES)
    assert body_of(root) is None


def test_where_it_cannot_be_written_none_counts(root: RootRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    root.write({"a": 1})
    root.write({"b": 2})
    write = root_record._write

    def full(descriptor: int, data: bytes, offset: int) -> None:
        if len(data) > HEADER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(root_record, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            root.write({"c": 3})
    assert body_of(root) is None
    root.write({"d": 4})
    assert body_of(root) == {"d": 4}


@pytest.mark.parametrize("payload", [b"[1]", b"{", b"\xff", b"[" * 100_000, b"1e999"])
def test_a_payload_that_is_no_object_is_none(root: RootRecord, payload: bytes) -> None:
    data = root_record._header(1, 2, payload) + payload
    os.pwrite(root.descriptor, data, 0)
    assert body_of(root) is None


def test_what_is_no_root_record_is_none() -> None:
    reader, writer = os.pipe()
    small = os.memfd_create("small")
    try:
        assert [read_root(descriptor) for descriptor in (reader, small, 10_000)] == [None] * 3
    finally:
        for descriptor in (reader, writer, small):
            os.close(descriptor)
