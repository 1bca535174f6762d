"""The root record: what a kill leaves of it, at every byte of every write, is the state before or the one after."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from support.counting import operations
from support.limits import nothing_written, room_for
from support.root_forms import write_first_form
from weightd_daemon.persistence import root_record
from weightd_daemon.persistence.root_record import SLOT_BYTES, PersistentRootRecord, RootRecordChange, read_root

HEADER = root_record._HEADER.size
NO_ROWS: dict[str, Any] = {"segments": [], "checkpoints": [], "names": []}
KEYS = st.integers(0, 4)
ROWS = st.none() | st.dictionaries(st.sampled_from("abc"), st.integers() | st.text(max_size=20), max_size=3)
CHANGES = st.lists(
    st.builds(RootRecordChange, st.sampled_from(["names", "segments"]), KEYS, ROWS, st.booleans()), max_size=4
)


@pytest.fixture
def root() -> Iterator[PersistentRootRecord]:
    made = PersistentRootRecord.create()
    yield made
    made.close()


@pytest.fixture
def torn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bytes]]]:
    """Every write of this test, as (offset, data)."""
    writes: list[tuple[int, bytes]] = []
    write = root_record._write

    def noted(descriptor: int, data: bytes, offset: int) -> None:
        writes.append((offset, data))
        write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(root_record, "_write", noted)
        yield writes


def body_of(root: PersistentRootRecord) -> dict[str, Any] | None:
    record = read_root(root.descriptor)
    return None if record is None else record.body


def name(key: int, value: object) -> RootRecordChange:
    return RootRecordChange("names", key, {"value": value})


def applied(body: dict[str, Any], changes: list[RootRecordChange]) -> dict[str, Any]:
    """A model: what the tables are after these changes."""
    tables = {table: dict(rows) for table, rows in body.items()}
    for table, key, row, merge in changes:
        rows = tables.setdefault(table, {})
        if row is None:
            rows.pop(key, None)
        elif not merge:
            rows[key] = dict(row)
        elif key in rows:
            rows[key] = {**rows[key], **row}
    return tables


def shown(tables: dict[str, Any], number: int) -> dict[str, Any]:
    return {"number": number, **NO_ROWS, **{table: list(rows.values()) for table, rows in tables.items()}}


def test_the_last_that_was_written_counts_and_takes_memory_for_what_it_is(root: PersistentRootRecord) -> None:
    assert body_of(root) is None
    root.write([name(0, 0)], {"number": 0})
    for number in range(1, 5):
        root.append([name(number % 2, number)], {"number": number})
    record = read_root(root.descriptor)
    assert record is not None
    assert record == (root_record.SCHEMA, 1, {**NO_ROWS, "number": 4, "names": [{"value": 4}, {"value": 3}]})
    assert os.fstat(root.descriptor).st_blocks * 512 <= 2 << 20  # a huge page at most
    again = PersistentRootRecord(os.dup(root.descriptor), record.sequence)
    again.write([name(0, "by the next daemon")], {})
    again.close()
    assert body_of(root) == {**NO_ROWS, "names": [{"value": "by the next daemon"}]}
    assert os.fstat(root.descriptor).st_blocks * 512 <= 2 << 20, "the slot before it is empty"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=CHANGES, steps=st.lists(CHANGES, max_size=5), based=st.integers(0, 5))
def test_a_write_that_is_torn_at_any_byte_leaves_the_state_before_or_after(
    root: PersistentRootRecord,
    torn: list[tuple[int, bytes]],
    base: list[RootRecordChange],
    steps: list[list[RootRecordChange]],
    based: int,
) -> None:
    """In every write of a log, of a new base begun beside it, and of the change from one to the other."""
    tables = applied({}, base)
    root.write(base, {"number": 0})

    def step(write: Callable[[], object], before: dict[str, Any], after: dict[str, Any]) -> None:
        torn.clear()
        whole = {offset: os.pread(root.descriptor, 8192, offset) for offset in (0, SLOT_BYTES)}
        write()
        done = {offset: os.pread(root.descriptor, 8192, offset) for offset in (0, SLOT_BYTES)}
        for slot, was in whole.items():
            os.pwrite(root.descriptor, was, slot)
        seen = [before]
        for offset, data in torn:
            for cut in range(len(data) + 1):
                os.pwrite(root.descriptor, data[:cut], offset)
                seen.append(body_of(root))
        assert seen[-1] == after
        assert all(state in (before, after) for state in seen)
        assert [state == after for state in seen] == sorted(state == after for state in seen) or before == after
        for slot, now in done.items():
            os.pwrite(root.descriptor, now, slot)
        assert body_of(root) == after

    for number, changes in enumerate(steps, start=1):
        before, tables = shown(tables, number - 1), applied(tables, changes)
        counters = {"number": number}
        step(lambda: root.append(changes, counters), before, shown(tables, number))  # noqa: B023  # called here
        if number == based:
            rows = [RootRecordChange(table, key, row) for table, there in tables.items() for key, row in there.items()]
            now = shown(tables, number)
            assert root._next is None, "no base has been begun"
            generation = root.sequence
            root.begin_base()
            step(lambda: root.copy(iter(rows), counters, 1 << 20), now, now)  # noqa: B023  # called here
            step(lambda: root.end_base(counters), now, now)  # noqa: B023  # called here
            assert root.sequence == generation + 1


def test_every_byte_of_a_frame_is_covered(root: PersistentRootRecord, torn: list[tuple[int, bytes]]) -> None:
    root.write([name(1, "a")], {})
    before = body_of(root)
    torn.clear()
    root.append([name(1, "b")], {})
    after = body_of(root)
    ((offset, data),) = torn
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        os.pwrite(root.descriptor, changed, offset)
        assert body_of(root) == before, position
    os.pwrite(root.descriptor, data, offset)
    assert body_of(root) == after
    os.pwrite(root.descriptor, b"\xff" * HEADER, SLOT_BYTES)  # the base is damaged: nothing can be built on it
    assert body_of(root) is None


def test_a_frame_counts_in_its_own_place_only(root: PersistentRootRecord, torn: list[tuple[int, bytes]]) -> None:
    """Neither after another frame, nor in the other slot, nor once more."""
    root.write([name(1, "a")], {})
    torn.clear()
    for value in "bcd":
        root.append([name(1, value)], {})
    (first, one), (_, two), (_, three) = torn
    assert len(one) == len(two) == len(three)
    os.pwrite(root.descriptor, one + three + two, first)
    assert body_of(root) == {**NO_ROWS, "names": [{"value": "b"}]}
    os.pwrite(root.descriptor, one + one, first)
    assert body_of(root) == {**NO_ROWS, "names": [{"value": "b"}]}
    whole = os.pread(root.descriptor, 4096, SLOT_BYTES)
    os.pwrite(root.descriptor, bytes(4096), SLOT_BYTES)
    os.pwrite(root.descriptor, whole, 0)
    assert body_of(root) is None


def test_a_new_base_is_copied_beside_the_changes_and_bounds_the_log(root: PersistentRootRecord) -> None:
    """However many changes there are, the record takes what its rows take."""
    rows = {key: {"value": "x" * 100, "key": key} for key in range(500)}
    root.write((RootRecordChange("names", key, row) for key, row in rows.items()), {})
    copied: Iterator[RootRecordChange] | None = None
    sizes, bases = [], 0
    for number in range(20_000):
        key = number % 500
        rows[key] = {"value": "y" * 100, "key": key, "number": number}
        most = root.append([RootRecordChange("names", key, rows[key])], {"number": number})
        if copied is not None:
            assert root._next is not None, "a base has been begun"
            if root.copy(copied, {"number": number}, most):
                root.end_base({"number": number})
                copied, bases = None, bases + 1
        elif root.outgrown:
            root.begin_base()
            copied = (RootRecordChange("names", key, rows[key]) for key in range(500))
        sizes.append(os.fstat(root.descriptor).st_blocks * 512)
        if number % 997 == 0:
            body = body_of(root)
            assert body is not None
            assert {row["key"]: row for row in body["names"]} == rows
    assert bases > 10
    assert max(sizes[10_000:]) <= max(max(sizes[:10_000]), 4 << 20)


def test_a_change_costs_the_same_however_many_rows_there_are(root: PersistentRootRecord) -> None:
    costs = []
    for rows in (100, 10_000):
        root.write((RootRecordChange("names", key, {"value": key}) for key in range(rows)), {})
        costs.append(operations(lambda: root.append([name(7, "other")], {})))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("done", [0, 1], ids=["nothing", "half"])
def test_a_change_that_cannot_be_written_leaves_the_state_before_it(
    root: PersistentRootRecord, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.write([name(1, "a")], {})
    write = root_record._write

    def full(descriptor: int, data: bytes, offset: int) -> None:
        write(descriptor, data[: done * len(data) // 2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(root_record, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            root.append([name(1, "b")], {})
    assert body_of(root) == {**NO_ROWS, "names": [{"value": "a"}]}
    root.write([name(1, "c")], {})
    assert body_of(root) == {**NO_ROWS, "names": [{"value": "c"}]}


@pytest.mark.parametrize("bases", [1, 2])
def test_where_no_base_can_be_written_none_counts(root: PersistentRootRecord, bases: int) -> None:
    """Whichever slot counted: an eviction goes on, and a record that still named its memory would be a lie."""
    for _ in range(bases):
        root.write([name(1, "a")], {})
    with nothing_written(), pytest.raises(OSError, match="too large"):
        root.write([name(1, "b")], {})
    assert body_of(root) is None
    root.write([name(1, "c")], {})
    assert body_of(root) == {**NO_ROWS, "names": [{"value": "c"}]}


def test_it_is_written_and_cleared_without_a_descriptor_left(root: PersistentRootRecord) -> None:
    """Clients take descriptors of the daemon's: that must neither lose what is kept nor have a lie count."""
    root.write([name(1, "a")], {})
    with room_for(os.getpid(), 0):
        with nothing_written(), pytest.raises(OSError, match="too large"):
            root.write([name(1, "b")], {})
        cleared = body_of(root) is None
        root.write([name(1, "c")], {})
    assert cleared
    assert body_of(root) == {**NO_ROWS, "names": [{"value": "c"}]}


def test_a_slot_that_is_full_is_an_error(root: PersistentRootRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    root.write([name(1, "a")], {})
    monkeypatch.setattr(root_record, "SLOT_BYTES", 4096)
    with pytest.raises(OSError, match="too many"):
        root.append([name(1, "x" * 4096)], {})


# -- the first form, of commit cf42aab ---------------------------------------------------------------------------------


def test_the_first_form_is_read_and_gives_way_to_todays(root: PersistentRootRecord) -> None:
    for sequence in (7, 8):
        write_first_form(root.descriptor, sequence, {"last_id": sequence, "names": [{"name": "a"}]})
    record = read_root(root.descriptor)
    assert record == (1, 8, {"last_id": 8, "names": [{"name": "a"}]})
    write_first_form(root.descriptor, 9, {"last_id": 9})
    os.pwrite(root.descriptor, b"torn", SLOT_BYTES + 60)
    assert read_root(root.descriptor) == record
    now = PersistentRootRecord(root.descriptor, 8)
    now.begin_base()
    assert read_root(root.descriptor) == record, "until the base is whole"
    now.write([name(1, "b")], {})
    assert read_root(root.descriptor) == (1, 9, {**NO_ROWS, "names": [{"value": "b"}]})
    assert os.pread(root.descriptor, HEADER, 0) == bytes(HEADER)


@pytest.mark.parametrize("payload", [b"[1]", b"{", b"\xff", b"[" * 100_000, b"1e999"])
def test_a_payload_of_the_first_form_that_is_no_object_is_none(root: PersistentRootRecord, payload: bytes) -> None:
    write_first_form(root.descriptor, 2, payload)
    assert body_of(root) is None


# -- what cannot be believed -------------------------------------------------------------------------------------------


ROWS_OF_NONSENSE = [
    "7",
    "[]",
    '["names",1]',
    '["names",[],{},0]',
    "[{},1,{},0]",
    '["names",1,7,0]',
    '["names",1,"ab",1]',
]
NONSENSE = [
    b"[1]",
    b"{",
    b"\xff",
    b"[" * 100_000,
    b"1e999",
    b"{}",
    b'{"counters":{},"rows":7}',
    b'{"counters":7,"rows":[]}',
    *(f'{{"counters":{{}},"rows":[{row}]}}'.encode() for row in ROWS_OF_NONSENSE),
]


@pytest.mark.parametrize("payload", NONSENSE)
def test_a_frame_of_nonsense_makes_the_record_none(root: PersistentRootRecord, payload: bytes) -> None:
    root.write([name(1, "a")], {})
    assert root._log is not None
    root._log.append(1, payload)
    assert body_of(root) is None


def test_what_is_no_root_record_is_none() -> None:
    reader, writer = os.pipe()
    small = os.memfd_create("small")
    try:
        assert [read_root(descriptor) for descriptor in (reader, small, 10_000)] == [None] * 3
    finally:
        for descriptor in (reader, writer, small):
            os.close(descriptor)
