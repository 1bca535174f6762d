"""What one daemon keeps and the next takes up, in one process: order, and that nothing is believed."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.counting import operations
from support.descriptors import open_descriptors
from support.kept_books import DATA, INDEXED, MIB, PEER, SOURCES, WHO, Books, Keeper
from support.limits import nothing_written
from support.root_forms import rows_of, write_first_form
from support.sealed import sealed_blobs
from weightd._manifest import FORM
from weightd._proto.v1 import handles_pb2
from weightd.errors import NotFoundError
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.catalog import CatalogTag
from weightd_daemon.core.checkpoint import BYTES_OF_TENSOR
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.devices.host import HostDevice
from weightd_daemon.handles.manifest_file import make_manifest
from weightd_daemon.persistence import descriptor_store, root_record
from weightd_daemon.persistence.descriptor_store import PersistentDescriptorStore
from weightd_daemon.persistence.given import GivenDescriptors
from weightd_daemon.persistence.root_record import PersistentRootRecord, read_root


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    before = len(open_descriptors())
    made = Keeper()
    yield made
    made.close()
    assert len(open_descriptors()) == before, "descriptors are left open"


@contextlib.contextmanager
def books(keeper: Keeper, **options: int) -> Iterator[Books]:
    made = Books(keeper, **options)
    yield made
    made.end()


@pytest.fixture
def kept(keeper: Keeper) -> Keeper:
    """What a daemon has left that held two checkpoints, which share a tensor."""
    with books(keeper) as first:
        for name, tensors in DATA.items():
            first.load(name, tensors)
        first.catalog.pin(WHO, first.catalog.find(WHO, "a"))
        first.catalog.restore("", "dangling", CatalogTag("sha256:" + "0" * 64, 7))
        first.descriptor_store.flip()
    return keeper


def change(keeper: Keeper, to: Callable[[dict[str, Any]], None], schema: int | None = None) -> None:
    """Write another root record."""
    record = read_root(keeper.kept["root"])
    assert record is not None
    body = copy.deepcopy(record.body)
    to(body)
    root = PersistentRootRecord(os.dup(keeper.kept["root"]), record.sequence)
    with pytest.MonkeyPatch.context() as patch:
        if schema is not None:
            patch.setattr("weightd_daemon.persistence.root_record.SCHEMA", schema)
        root.write(*rows_of(body))
    root.close()


def put(keeper: Keeper, name: str, descriptor: int) -> None:
    """Keep something else under a name."""
    os.close(keeper.kept.pop(name))
    keeper.kept[name] = descriptor


def test_a_uid_may_need_all_32_bits(kept: Keeper) -> None:
    first_row("checkpoints", owner=2**32 - 2, pins=[2**31])(kept)
    with books(kept) as again:
        restored = {(checkpoint.owner, *checkpoint.pins) for checkpoint in again.store.checkpoints.values()}
    assert (2**32 - 2, 2**31) in restored


def test_the_next_has_what_the_last_had(kept: Keeper) -> None:
    with books(kept) as again:
        assert again.names() == {"a", "b"}
        for name, tensors in DATA.items():
            assert again.bytes_of(name) == list(tensors.values())
            checkpoint = again.catalog.find(WHO, name)
            assert (checkpoint.owner, checkpoint.loaded, checkpoint.pinned) == (1000, 5.0, name == "a")
            assert (checkpoint.origin, checkpoint.sources, checkpoint.reference) == (SOURCES, [INDEXED], "/m")
            assert checkpoint.books_bytes == again.manifests.size(checkpoint.key) + 3 * BYTES_OF_TENSOR
        assert again.store.books.used == sum(c.books_bytes for c in again.store.checkpoints.values())
        assert again.catalog.tags["", "dangling"].owner == 7
        memory = again.store.memories["host"]
        segments = {blob.segment for blob in sealed_blobs(again.store)}
        assert memory.used == sum(again.device.allocated(segment) for segment in segments) == 5 * MIB
        shared = again.catalog.find(WHO, "b").components[""][2]
        assert shared.references == 2


@pytest.mark.parametrize("reason", ["removed", "capacity"])
def test_what_the_root_record_names_is_always_stored_and_where_it_says(keeper: Keeper, reason: str) -> None:
    with books(keeper) as first:
        checkpoint = first.load("a", DATA["a"])
        first.store.remove(checkpoint, "a", reason)
        first.reclaim()
    stored: set[str] = set()
    dropped = []
    for what, name, root in keeper.told:
        named = {f"seg.{row['id']}" for row in root.get("segments", ())}
        named |= {f"man.{row['manifest']}" for row in root.get("checkpoints", ())}
        if what == "drop":
            stored.discard(name)
            dropped.append(name[:3])
        assert named <= stored, "it names what is not stored, or not any more"
        if what == "store":
            stored.add(name)
    assert [what for what, *_ in keeper.told] == ["drop", "store", "barrier", *["store"] * 2, "barrier", *["drop"] * 2]
    assert dropped == ["roo", "man", "seg"]
    assert keeper.root["checkpoints"] == []
    assert [row["name"] for row in keeper.root["names"]] == ([] if reason == "removed" else ["a"])


def test_a_root_record_that_cannot_be_made_says_nothing_rather_than_what_was(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An eviction goes on, and its memory is used again: a record that still names it would have others' bytes read."""
    with books(keeper) as first:
        checkpoint = first.load("a", DATA["a"])
        assert len(keeper.root["checkpoints"]) == 1
        with monkeypatch.context() as patch:
            patch.setattr(first.descriptor_store._record, "_checkpoint", lambda *_: 1 / 0)
            first.load("b", DATA["b"])
            first.store.remove(checkpoint, "a", "capacity")
        assert keeper.root == {}
        assert "ZeroDivisionError" in caplog.text
        first.descriptor_store.flip()
        assert len(keeper.root["checkpoints"]) == 1


@pytest.mark.parametrize("when", ["later", "at the end"])
def test_a_root_record_that_could_not_be_written_is_written_again(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(descriptor_store, "RETRY_SECONDS", (0.0,))

    async def fail_once(first: Books) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(root_record, "_write", full)
            first.descriptor_store.flip()
        assert keeper.root == {}, "the old state must not count any more"
        if when == "later":
            async with asyncio.timeout(10):
                while not keeper.root:  # noqa: ASYNC110  # a memfd tells nobody
                    await asyncio.sleep(0.01)

    def full(descriptor: int, data: bytes, offset: int) -> None:
        if any(data):  # it can still be cleared
            raise OSError(errno.ENOSPC, "No space left on device")
        os.pwrite(descriptor, data, offset)

    with books(keeper) as first:
        first.catalog.set(WHO, "b", first.load("a", DATA["a"]).key.content_digest)
        asyncio.run(fail_once(first))
        if when == "at the end":
            first.descriptor_store.close()
    with books(keeper) as again:
        assert again.names() == {"a", "b"}


def test_a_change_that_cannot_be_written_once_costs_nothing_that_is_kept(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a kill comes, it finds the names of before, and afterwards the new one."""
    write, seen = root_record._write, []

    def full_at_first(descriptor: int, data: bytes, offset: int) -> None:
        seen.append({row["name"] for row in keeper.root.get("names", ())})
        if len(seen) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor, data, offset)

    with books(keeper) as first:
        first.catalog.set(WHO, "b", first.load("a", DATA["a"]).key.content_digest)
        with monkeypatch.context() as patch:
            patch.setattr(root_record, "_write", full_at_first)
            first.descriptor_store.flip()
    assert len(seen) > 1
    assert all("a" in names for names in seen)
    with books(keeper) as again:
        assert again.names() == {"a", "b"}


def test_writing_again_is_tried_soon_and_then_less_often(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    expected = [*descriptor_store.RETRY_SECONDS, *descriptor_store.RETRY_SECONDS[-1:] * 2]

    async def fail(first: Books) -> None:
        loop = asyncio.get_running_loop()
        later = loop.call_later

        def at_once(pause: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
            pauses.append(pause)
            return later(0.0, callback)

        monkeypatch.setattr(loop, "call_later", at_once)
        async with asyncio.timeout(60):
            for _ in range(2):  # after a success it begins anew
                pauses.clear()
                first.store.changed |= first.store.checkpoints.keys()
                with nothing_written():
                    first.descriptor_store.flip()
                    while len(pauses) < len(expected):  # noqa: ASYNC110  # the next turn of the loop is what is wanted
                        await asyncio.sleep(0)
                assert pauses == expected
                while not keeper.root:  # noqa: ASYNC110  # a memfd tells nobody
                    await asyncio.sleep(0)

    with books(keeper) as first:
        first.load("a", DATA["a"])
        asyncio.run(fail(first))


def test_a_lease_is_found_by_its_lock_and_numbers_go_on(keeper: Keeper) -> None:
    with books(keeper) as first:
        key = first.load("a", DATA["a"]).key
        leases = [first.store.leases.begin(key, PEER, 6.0) for _ in range(9)]
        locks = [first.lock(key, lease.number) for lease in leases]
    for lock in locks[::2]:
        os.close(lock)
    with books(keeper) as again:
        found = again.store.leases.of(key)
        assert [lease.number for lease in found] == [lease.number for lease in leases[1::2]]
        assert {(lease.peer.pid, lease.peer.command, lease.since) for lease in found} == {(None, "", 7.0)}
        assert again.store.leases.begin(key, PEER, 8.0).number > leases[-1].number
        for lock in locks[1::2]:
            os.close(lock)
        assert again.store.leases.of(key) == []


def test_locks_that_take_too_long_to_tell_apart_are_one_lease(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    with books(keeper) as first:
        key = first.load("a", DATA["a"]).key
        locks = [first.lock(key, first.store.leases.begin(key, PEER, 6.0).number) for _ in range(9)]
    monkeypatch.setattr("weightd_daemon.handles.kernel_locks.LOOK_SECONDS", 0.0)
    with books(keeper) as again:
        assert len(again.store.leases.of(key)) == 1
        for lock in locks:
            assert len(again.store.leases.of(key)) == 1
            os.close(lock)
        assert again.store.leases.of(key) == []


def test_lists_of_files_that_are_too_long_are_left_out_and_the_rest_is_kept(keeper: Keeper) -> None:
    """Whoever loads says how many files there are and what they are called, and may say so again and again."""
    long = tuple(SourceFile("c" * 1000, "f" * 1000, FileIdentity(1, n, 3, 4, 5)) for n in range(1000))
    half = tuple(SourceFile("c" * 1000, "f" * 1000, FileIdentity(2, n, 3, 4, 5)) for n in range(15))
    with books(keeper) as first:
        one = first.load("a", DATA["a"])
        one.origin, one.sources = long, [long, SOURCES]
        two = first.load("b", DATA["b"])
        two.sources = [half] * 200
        first.store.changed |= {one.key, two.key}
        first.descriptor_store.flip()
    assert len(json.dumps(keeper.root)) < 8 * MIB
    with books(keeper) as again:
        restored = again.catalog.find(WHO, "a")
        assert (restored.origin, restored.sources) == ((), [SOURCES])
        assert 100 < len(again.catalog.find(WHO, "b").sources) < 200
        assert again.bytes_of("a") == list(DATA["a"].values())


# -- what cannot be believed -------------------------------------------------------------------------------------------


def first_manifest(keeper: Keeper) -> handles_pb2.Manifest:
    return manifest_of(keeper, keeper.root["checkpoints"][0]["content"])


def manifest_of(keeper: Keeper, content_digest: str) -> handles_pb2.Manifest:
    """What is kept as the manifest of a checkpoint."""
    (row,) = (row for row in keeper.root["checkpoints"] if row["content"] == content_digest)
    descriptor = keeper.kept[f"man.{row['manifest']}"]
    return handles_pb2.Manifest.FromString(os.pread(descriptor, os.fstat(descriptor).st_size, 0))


def other_manifest(edit: Callable[[handles_pb2.Manifest], object]) -> Callable[[Keeper], None]:
    """Another manifest in the place of the first checkpoint's."""

    def tamper(keeper: Keeper) -> None:
        manifest = first_manifest(keeper)
        edit(manifest)
        name = f"man.{keeper.root['checkpoints'][0]['manifest']}"
        put(keeper, name, make_manifest(manifest.SerializeToString()))

    return tamper


def first_row(table: str, **values: Any) -> Callable[[Keeper], None]:
    """Other values in a table's first row."""
    return lambda keeper: change(keeper, lambda body: body[table][0].update(values))


def unsealed(keeper: Keeper) -> None:
    descriptor = os.memfd_create("manifest", os.MFD_ALLOW_SEALING)
    os.write(descriptor, first_manifest(keeper).SerializeToString())
    put(keeper, f"man.{keeper.root['checkpoints'][0]['manifest']}", descriptor)


def first_segment(make: Callable[[int], int]) -> Callable[[Keeper], None]:
    """Something else in the place of the first segment; `make` is given its size."""
    return lambda keeper: put(
        keeper, f"seg.{keeper.root['segments'][0]['id']}", make(keeper.root["segments"][0]["size"])
    )


def plain(size: int) -> int:
    descriptor = os.memfd_create("segment")
    os.ftruncate(descriptor, size)
    return descriptor


def shrunk(size: int) -> int:
    device = HostDevice()
    descriptor = os.dup(device.writable(device.create(size // 2)))
    device.close()
    return descriptor


def read_only(size: int) -> int:
    device = HostDevice()
    descriptor = os.dup(device.shared(device.create(size)))
    device.close()
    return descriptor


def write_sealed(size: int) -> int:
    descriptor = os.memfd_create("segment", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0xF)
    os.fchmod(descriptor, 0o400)
    return descriptor


TAMPERED: dict[str, tuple[Callable[[Keeper], None], str]] = {
    "no manifest": (lambda keeper: keeper.drop(f"man.{keeper.root['checkpoints'][0]['manifest']}"), "is not there"),
    "no segment": (lambda keeper: keeper.drop(f"seg.{keeper.root['segments'][0]['id']}"), "its descriptor is not"),
    "manifest not sealed": (unsealed, "its manifest is not sealed"),
    "manifest is none": (
        lambda keeper: put(keeper, f"man.{keeper.root['checkpoints'][0]['manifest']}", make_manifest(b"\xff" * 99)),
        "is left",
    ),
    "another digest": (other_manifest(lambda m: setattr(m, "content_digest", "sha256:" + "1" * 64)), "is another's"),
    "another device": (other_manifest(lambda m: setattr(m, "device", "GPU-0")), "is another's"),
    "another kind": (other_manifest(lambda m: setattr(m, "kind", "cuda_vmm")), "is another's"),
    "another name": (other_manifest(lambda m: m.names.__setitem__(0, "x")), "not what its digest says"),
    "another blob": (
        other_manifest(lambda m: setattr(m, "digests", bytes(16) + m.digests[16:])),
        "not what its digest",
    ),
    "another length": (other_manifest(lambda m: m.lengths.__setitem__(0, 5)), "not what its digest says"),
    "fewer digests": (other_manifest(lambda m: setattr(m, "digests", b"")), "columns of different lengths"),
    "fewer rows": (other_manifest(lambda m: m.lengths.pop()), "columns of different lengths"),
    "no such dtype": (other_manifest(lambda m: m.dtypes.__setitem__(0, 999)), "dtype that is not there"),
    "no such file": (other_manifest(lambda m: m.file_indices.__setitem__(0, 9)), "a file that it does not have"),
    "no such segment": (other_manifest(lambda m: m.segments.__setitem__(0, 9)), "is not there"),
    "negative shape": (other_manifest(lambda m: m.dimensions.__setitem__(0, -1)), "shapes that cannot be"),
    "beyond the segment": (other_manifest(lambda m: m.offsets.__setitem__(0, 1 << 40)), "beyond their segment"),
    "negative offset": (other_manifest(lambda m: m.offsets.__setitem__(0, -256)), "beyond their segment"),
    "not aligned": (other_manifest(lambda m: m.offsets.__setitem__(0, 8)), "cannot be"),
    "one in another": (other_manifest(lambda m: m.offsets.__setitem__(0, m.offsets[1] + 256)), "lies on another"),
    "one over another": (other_manifest(lambda m: m.offsets.__setitem__(1, m.offsets[2] - 256)), "lies on another"),
    "one for another": (
        other_manifest(lambda m: m.offsets.__setitem__(0, m.offsets[1])),
        "lie in one place",
    ),
    "a later form": (other_manifest(lambda m: setattr(m, "form", 2)), "is of form 2; this version of weightd reads up"),
    "segment sizes": (other_manifest(lambda m: m.segment_bytes.__setitem__(0, 1)), "not those of its manifest"),
    "segment is plain": (first_segment(plain), "is no segment of|cannot be taken over"),
    "segment is shorter": (first_segment(shrunk), "is no segment of"),
    "segment is read-only": (first_segment(read_only), "is no segment of"),
    "segment is sealed": (first_segment(write_sealed), "is no segment of"),
    "segment is a pipe": (first_segment(lambda _: os.open("/dev/null", os.O_RDWR)), "cannot be taken over"),
    "segment size": (first_row("segments", size=12345), "no whole pages"),
    "segment size is none": (first_row("segments", size=-4096), "is no number"),
    "segment of nobody": (first_row("segments", device="GPU-0"), "is not served here"),
    "segment kind": (first_row("segments", kind="cuda_vmm"), "is not served here"),
    "segment domain": (first_row("segments", domain="uid-7"), "of another device or domain"),
    "segment without id": (first_row("segments", id=None), "is no number"),
    "digest is none": (first_row("checkpoints", content="sha256:00"), "its content digest is none"),
    "times are none": (first_row("checkpoints", loaded="now"), "is no time"),
    "time is none": (first_row("checkpoints", last_used=float("nan")), "is no time"),
    "owner is none": (first_row("checkpoints", owner="root"), "is no number"),
    "owner is nobody": (first_row("checkpoints", owner=2**32 - 1), "is no uid"),
    "pin of nobody": (first_row("checkpoints", pins=[1000, 2**32]), "is no uid"),
    "pins are none": (first_row("checkpoints", pins=7), "is left"),
    "sources are none": (first_row("checkpoints", sources=[["x"]]), "is left"),
    "segments are none": (first_row("checkpoints", segments="all"), "is left"),
    "too few segments": (first_row("checkpoints", segments=[]), "not those of its manifest"),
    "row is empty": (lambda keeper: change(keeper, lambda body: body["checkpoints"][0].clear()), "is not there"),
}


@pytest.mark.parametrize("case", sorted(TAMPERED))
def test_what_is_damaged_is_left_with_a_line_and_the_rest_is_taken_up(
    kept: Keeper, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    tamper, said = TAMPERED[case]
    names = [f"seg.{number}" for number in kept.root["checkpoints"][0]["segments"]]
    seen = {name: os.dup(kept.kept[name]) for name in names}  # as clients of the damaged checkpoint have it
    tamper(kept)
    before = {name: os.pread(descriptor, 4 * MIB, 0) for name, descriptor in seen.items()}
    with caplog.at_level(logging.WARNING), books(kept) as again:
        assert "a" not in again.names()
        lines = [record.getMessage() for record in caplog.records]
        assert any("is left" in line and re.search(said, line) for line in lines), lines
        if case == "segment domain":
            assert any(line.startswith("checkpoint a content=sha256:") for line in lines), "it is named"
        if "b" in again.names():
            assert again.bytes_of("b") == list(DATA["b"].values())
        memory = again.store.memories["host"]
        for number in range(5):
            again.load(f"more{number}", {"t": bytes([number, 7, number]) * (MIB >> number)})
        assert memory.used <= memory.budget
    for name, descriptor in seen.items():
        if name in kept.kept and os.fstat(kept.kept[name]).st_ino == os.fstat(descriptor).st_ino:
            assert os.pread(descriptor, 4 * MIB, 0) == before[name], "bytes have changed that somebody may read"
        os.close(descriptor)
    with books(kept) as third:
        assert third.names() >= {f"more{number}" for number in range(5)}


def test_a_manifest_of_a_daemon_that_numbered_no_forms_is_taken_up(kept: Keeper) -> None:
    assert first_manifest(kept).form == FORM
    other_manifest(lambda manifest: manifest.ClearField("form"))(kept)
    with books(kept) as again:
        assert again.bytes_of("a") == list(DATA["a"].values())
        checkpoint = again.catalog.find(WHO, "a")
        table = again.manifests.table(checkpoint.key)
        assert table.find([], [("", name) for name in DATA["a"]]) == list(range(len(checkpoint.segments)))
        with pytest.raises(NotFoundError, match="tensor 'zz' is not in the checkpoint"):
            table.find([], [("", "zz")])


@pytest.mark.parametrize(("offset", "said"), [(0, "lies where another does"), (256, "lies on another")])
def test_no_blob_is_put_where_another_checkpoint_has_one(
    kept: Keeper, offset: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    row = kept.root["checkpoints"][1]
    descriptor = kept.kept[f"man.{row['manifest']}"]
    manifest = handles_pb2.Manifest.FromString(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    manifest.segments[0], manifest.offsets[0] = manifest.segments[2], offset
    put(kept, f"man.{row['manifest']}", make_manifest(manifest.SerializeToString()))
    with caplog.at_level(logging.WARNING), books(kept) as again:
        assert again.names() == {"a"}
        assert said in caplog.text
        assert again.bytes_of("a") == list(DATA["a"].values())


@pytest.mark.parametrize("schema", [0, 2, 99])
def test_of_another_schema_is_taken_up_what_is_understood(
    kept: Keeper, schema: int, caplog: pytest.LogCaptureFixture
) -> None:
    def to(body: dict[str, Any]) -> None:
        body["caches"] = [{"id": 3}]
        body["checkpoints"][1]["manifests"] = [body["checkpoints"][1].pop("manifest")]
        body["checkpoints"][0]["colour"] = "blue"

    change(kept, to, schema)
    with caplog.at_level(logging.WARNING), books(kept) as again:
        assert again.names() == {"a"}
        assert f"has schema {schema}, not 1: left are caches" in caplog.text
        memory = again.store.memories["host"]
        assert all(memory.is_frozen(blob.segment) for blob in sealed_blobs(again.store))


@pytest.mark.parametrize("body", [{}, {"segments": 7, "checkpoints": {}, "names": [1, None]}, {"last_id": -1}])
def test_a_root_record_of_nonsense_leaves_everything(kept: Keeper, body: dict[str, Any]) -> None:
    def to(there: dict[str, Any]) -> None:
        there.clear()
        there.update(body)

    record = read_root(kept.kept["root"])
    assert record is not None
    content = dict(record.body)
    to(content)
    write_first_form(kept.kept["root"], record.sequence + 1, content)
    with books(kept) as again:
        assert again.store.checkpoints == {}
        assert kept.kept.keys() == {"root"}
        again.load("a", DATA["a"])
    with books(kept) as third:
        assert third.names() == {"a"}


def test_without_a_root_record_everything_is_let_go(kept: Keeper, caplog: pytest.LogCaptureFixture) -> None:
    numbers = {int(name[4:]) for name in kept.kept if name != "root"}
    for slot in (0, 1):
        os.pwrite(kept.kept["root"], bytes(100), slot * (256 << 20))
    kept.kept["stranger"] = os.open("/dev/null", os.O_RDONLY)
    with caplog.at_level(logging.WARNING), books(kept) as again:
        assert "a root record is damaged, in both of its slots" in caplog.text
        assert "starting empty" in caplog.text
        assert kept.kept.keys() == {"root"}
        again.load("a", DATA["a"])
        assert min(int(name[4:]) for name in kept.kept if name != "root") > max(numbers), "a number is used twice"


def test_of_two_root_records_the_newer_counts(kept: Keeper) -> None:
    with books(kept):  # each start writes a base, and so the next generation
        pass
    older = PersistentRootRecord.create()
    older.write(*rows_of({"last_id": 1}))
    first = dict(kept.kept)
    kept.kept = {"root ": older.descriptor, **first}  # the name comes twice
    given = [(name.strip(), os.dup(descriptor)) for name, descriptor in kept.kept.items()]
    os.close(kept.kept.pop("root "))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PersistentDescriptorStore, "__init__", _given(given, PersistentDescriptorStore.__init__))
        with books(kept) as again:
            assert again.names() == {"a", "b"}


def _given(given: list[tuple[str, int]], original: Any) -> Any:
    def init(self: PersistentDescriptorStore, **options: Any) -> None:
        plain = options["given"]
        plain.root.close()
        for descriptor in plain.descriptors.values():
            os.close(descriptor)
        original(self, **{**options, "given": GivenDescriptors(given)})

    return init


# -- a manager that does not keep --------------------------------------------------------------------------------------


def test_a_manager_that_refuses_costs_a_warning_and_not_the_load(
    keeper: Keeper, caplog: pytest.LogCaptureFixture
) -> None:
    with books(keeper) as first:
        keeper.broken = True
        with caplog.at_level(logging.WARNING):
            first.load("a", DATA["a"])
        assert "ends with this daemon: nobody is there" in caplog.text
        keeper.broken = False
        first.load("b", DATA["b"])
        assert [row["frozen"] for row in keeper.root["segments"]].count(True) == 1, "the tensor that both have"
    with books(keeper) as again:
        assert again.names() == {"b"}


@pytest.mark.parametrize("deaf", ["seg.", "man."])
def test_what_a_manager_gives_up_later_is_not_taken_for_kept(
    keeper: Keeper, caplog: pytest.LogCaptureFixture, deaf: str
) -> None:
    with books(keeper) as first:
        keeper.deaf = deaf
        with caplog.at_level(logging.WARNING):
            first.load("a", DATA["a"])
        assert "ends with this daemon: the service manager did not take all" in caplog.text
        keeper.deaf = ""
        first.load("b", DATA["b"])
        assert first.descriptor_store._stored <= {"root", *keeper.kept}, "what was given up does not count"
        assert {"seg.", "man."} == {name[:4] for kind, name, _ in keeper.told if kind == "store" and name != "root"}
    with books(keeper) as again:
        assert again.names() == {"b"}


def test_where_no_manager_listens_nothing_is_made(keeper: Keeper) -> None:
    keeper.listens = False
    with books(keeper) as first:
        first.load("a", DATA["a"])
        assert keeper.told == []


def test_a_content_that_is_there_leaves_no_second_manifest(keeper: Keeper) -> None:
    with books(keeper) as first:
        checkpoint = first.load("a", DATA["a"])
        assert first.load("again", DATA["a"]) is checkpoint
        assert len([name for name in keeper.kept if name.startswith("man.")]) == 1
    with books(keeper) as second:
        assert second.names() == {"a", "again"}


def test_numbers_that_sort_otherwise_keep_the_order_of_the_manifest(kept: Keeper) -> None:
    """In a manifest a segment goes by its place; adopted in another order, they have other numbers here."""
    change(kept, lambda body: body["segments"].reverse())
    with books(kept) as again:
        for name, tensors in DATA.items():
            checkpoint = again.catalog.find(WHO, name)
            manifest = manifest_of(kept, checkpoint.key.content_digest)
            for row, data in enumerate(tensors.values()):
                segment = checkpoint.segments[manifest.segments[row]]
                found = os.pread(again.device.shared(segment), manifest.lengths[row], manifest.offsets[row])
                assert found == data
        assert any(c.segments != sorted(c.segments) for c in again.store.checkpoints.values())


def test_a_root_record_of_a_daemon_that_counted_no_uses_is_ordered_by_its_times(keeper: Keeper) -> None:
    with books(keeper) as first:
        for number, name in enumerate("abc"):
            first.load(name, {"t": bytes([number]) * (2 * MIB)})
        first.descriptor_store.flip()

    def as_before(body: dict[str, Any]) -> None:
        for row, time in zip(body["checkpoints"], (5.0, 9.0, 1.0), strict=True):
            del row["used"]
            row["last_used"] = time

    change(keeper, as_before)
    with books(keeper, budget=5 * MIB) as again:
        assert again.names() == {"a", "b"}
        again.store.use(again.catalog.find(WHO, "a"), 0.0)
        again.descriptor_store.flip(uses=True)
    with books(keeper, budget=3 * MIB) as again:
        assert again.names() == {"a"}, "the count goes on"


def test_the_least_recently_used_goes_where_the_budget_is_smaller(keeper: Keeper) -> None:
    with books(keeper) as first:
        for number in range(4):
            first.load(f"c{number}", {"t": bytes([number]) * (2 * MIB)})
        for now, name in enumerate(("c3", "c2", "c1", "c0")):
            first.store.use(first.catalog.find(WHO, name), float(9 - now))  # a clock that is stepped back all the time
        first.descriptor_store.flip(uses=True)
    with books(keeper, budget=5 * MIB) as again:
        assert again.names() == {"c0", "c1"}
        assert again.store.memories["host"].used == 4 * MIB
        assert len(keeper.root["checkpoints"]) == 2


# -- what is written, and when -----------------------------------------------------------------------------------------


def test_a_step_of_the_loop_writes_once_and_before_what_it_has_woken(keeper: Keeper) -> None:
    """Loads, names, pins and evictions of one step are one frame; what a step wakes finds them written."""
    with books(keeper) as first:
        there = [first.load(name, {"t": name.encode() * MIB}) for name in "abc"]
        written: list[int] = []
        record = first.descriptor_store._record
        write, root = record.write, record.root
        assert root is not None
        append = root.append

        def counted(*arguments: Any) -> int:
            written.append(1)
            return append(*arguments)

        root.append = counted  # type: ignore[method-assign]  # counts

        async def run() -> None:
            woken = asyncio.Event()

            async def wait() -> list[str]:
                await woken.wait()
                return sorted(row["name"] for row in keeper.root["names"])

            waiting = asyncio.create_task(wait())
            await asyncio.sleep(0)
            for checkpoint in there:
                first.catalog.set(WHO, f"also {checkpoint.key.content_digest[-4:]}", checkpoint.key.content_digest)
                first.catalog.pin(WHO, checkpoint)
            first.store.evict(there[0], "capacity")
            woken.set()
            assert not written, "in the midst of a step"
            names = await waiting
            assert len(names) == 6
            assert len(written) == 1
            await asyncio.sleep(0)

        asyncio.run(run())
        assert len(written) == 1
        assert write == record.write
        assert len(keeper.root["checkpoints"]) == 2


def test_bytes_that_an_eviction_frees_are_granted_and_returned_only_when_it_is_written(keeper: Keeper) -> None:
    with books(keeper) as first:
        memory = first.store.memories["host"]
        checkpoint, other = first.load("a", DATA["a"]), first.load("c", {"t": b"c" * (2 * MIB)})
        first.store.evict(checkpoint, "capacity")
        assert len(keeper.root["checkpoints"]) == 2
        assert memory.next_reclaims()
        assert len(keeper.root["checkpoints"]) == 1
        first.store.evict(other, "capacity")
        load = StoreTransaction(first.store, "host", "", 1000)
        assert load.grant(MIB, MIB) is not None
        assert keeper.root["checkpoints"] == []
        load.end()


def test_a_use_is_written_with_the_next_change_and_at_the_end(keeper: Keeper) -> None:
    """Else each attach would write."""
    with books(keeper) as first:
        one, two = first.load("a", DATA["a"]), first.load("b", DATA["b"])

        def used() -> list[int]:
            return [row["used"] for row in keeper.root["checkpoints"]]

        before = used()
        first.store.use(one, 9.0)
        first.descriptor_store.flip()
        assert used() == before
        first.catalog.pin(WHO, two)
        first.descriptor_store.flip()
        assert used() == [one.used, two.used] != before
        first.store.use(two, 9.0)
        first.descriptor_store.flip()
        assert used() != [one.used, two.used]
        first.descriptor_store.close()
        assert used() == [one.used, two.used]


def test_before_a_lease_is_locked_everything_is_written(keeper: Keeper) -> None:
    """What a client has attached must be there for the next daemon, however early in the step it was sealed."""
    with books(keeper) as first:
        checkpoint = first.load("a", DATA["a"])
        first.catalog.set(WHO, "late", checkpoint.key.content_digest)
        assert [row["name"] for row in keeper.root["names"]] == ["a"]
        os.close(first.lock(checkpoint.key, 1))
        assert [row["name"] for row in keeper.root["names"]] == ["a", "late"]


def test_a_change_writes_the_same_however_much_is_kept(keeper: Keeper) -> None:
    """Naming, pinning and using one of n cost what they change."""
    with books(keeper, budget=512 * MIB) as first:
        costs: list[list[int]] = []
        there = [first.load(f"n{number}", {"t": number.to_bytes(4, "little") * 1024}) for number in range(10)]
        for more in (0, 50):
            there += [
                first.load(f"n{number}", {"t": number.to_bytes(4, "little") * 1024}) for number in range(10, 10 + more)
            ]
            one = there[3 if more else 2]

            def cost(change: Callable[[], object]) -> int:
                def write() -> None:
                    change()
                    first.descriptor_store.flip(uses=True)

                root = first.descriptor_store._record.root
                assert root is not None
                root.write(first.descriptor_store._record._everything(), {})  # no new base is under way
                first.descriptor_store._record._copied = None
                return operations(write)

            digest = one.key.content_digest
            costs.append(
                [
                    cost(lambda: first.catalog.set(WHO, f"also {digest[-4:]}", digest)),  # noqa: B023  # called here
                    cost(lambda: first.catalog.pin(WHO, one)),  # noqa: B023  # as above
                    cost(lambda: first.store.use(one, 9.0)),  # noqa: B023  # as above
                    cost(lambda: first.catalog.unpin(WHO, one)),  # noqa: B023  # as above
                ]
            )
        assert len(first.store.checkpoints) == 60
    for few, many in zip(*costs, strict=True):
        assert many <= few * 1.05, costs


def test_bases_are_begun_while_it_serves_and_say_the_same(keeper: Keeper) -> None:
    with books(keeper) as first:
        first.load("a", DATA["a"])
        root = first.descriptor_store._record.root
        assert root is not None
        begun = root.sequence
        for number in range(200):
            checkpoint = first.load(f"b{number % 7}", {"t": bytes([number % 7 + 1]) * MIB, "u": b"x" * 4096})
            first.catalog.set(WHO, f"{'long' * 200} {number}", checkpoint.key.content_digest)
            first.descriptor_store.flip()
            if number % 3 == 0:
                first.store.remove(checkpoint, "", "removed")
                first.descriptor_store.flip()
                first.reclaim()
        assert root.sequence > begun + 1
        names, contents = first.catalog.tags, [*first.store.checkpoints]
        marks = {key: (c.used, c.last_used, c.pins, c.sources) for key, c in first.store.checkpoints.items()}
    with books(keeper) as again:
        assert again.catalog.tags == names
        assert sorted(again.store.checkpoints) == sorted(contents)
        found = {key: (c.last_used, c.pins, c.sources) for key, c in again.store.checkpoints.items()}
        assert found == {key: mark[1:] for key, mark in marks.items()}
        by_use = sorted(marks, key=lambda key: marks[key][0])
        assert sorted(found, key=lambda key: again.store.checkpoints[key].used) == by_use


def test_files_that_mean_another_content_now_mean_it_to_the_next_daemon(keeper: Keeper) -> None:
    with books(keeper) as first:
        one, two = first.load("a", DATA["a"]), first.load("b", DATA["b"])
        two.sources = []
        first.store.changed.add(two.key)
        first.descriptor_store.flip()
        one.sources, two.sources = [], [SOURCES]
        first.store.changed |= {one.key, two.key}
        first.descriptor_store.flip()
    with books(keeper) as again:
        assert again.catalog.find(WHO, "a").sources == []
        assert again.catalog.find(WHO, "b").sources == [SOURCES]


# -- names that were only a path ---------------------------------------------------------------------------------------


def test_default_names_go_with_their_content_and_no_next_daemon_knows_them(keeper: Keeper) -> None:
    with books(keeper) as first:
        for number in range(40):
            checkpoint = first.load("kept", {"t": bytes([number]) * MIB})
            first.catalog.set(WHO, f"/models/{number}", checkpoint.key.content_digest, is_default=True)
            first.store.evict(checkpoint, "capacity")
            first.descriptor_store.flip()
        assert [row["name"] for row in keeper.root["names"]] == ["kept"]
        last = first.load("kept", DATA["a"])
        first.catalog.set(WHO, "/models/last", last.key.content_digest, is_default=True)
        first.descriptor_store.flip()
    with books(keeper) as again:
        assert again.catalog.tags["", "/models/last"] == CatalogTag(last.key.content_digest, 1000, is_default=True)
        again.store.evict(again.catalog.find(WHO, "kept"), "capacity")
        again.descriptor_store.flip()
    with books(keeper) as third:
        assert [name for _, name in third.catalog.tags] == ["kept"]


def test_a_record_of_the_first_form_is_taken_up_and_its_dead_paths_are_not(kept: Keeper) -> None:
    """As commit cf42aab has left it: no count of uses, no reference, and a name for every path that ever came."""
    record = read_root(kept.kept["root"])
    assert record is not None
    body = copy.deepcopy(record.body)
    for row in body["checkpoints"]:
        del row["used"], row["reference"]
    for row in body["names"]:
        del row["default"]
    gone = {"domain": "", "content": "sha256:" + "1" * 64, "owner": 1000}
    body["names"] += [{**gone, "name": f"/gone/{number}"} for number in range(9)]
    body["names"].append({**gone, "name": "/there", "content": body["checkpoints"][0]["content"]})
    for slot in (0, 1):
        os.pwrite(kept.kept["root"], bytes(64), slot << 28)
    write_first_form(kept.kept["root"], 77, body)
    for _ in range(2):
        with books(kept) as again:
            assert again.names() == {"a", "b", "/there"}
            assert {name for _, name in again.catalog.tags} == {"a", "b", "/there", "dangling"}
            for name, tensors in DATA.items():
                assert again.bytes_of(name) == list(tensors.values())
            assert not any(again.store.memories["host"].is_frozen(blob.segment) for blob in sealed_blobs(again.store))
    found = read_root(kept.kept["root"])
    assert found is not None
    assert found.sequence == 79


@pytest.mark.parametrize(
    "values",
    [
        {"owner": 2**32},
        {"owner": 2**64 - 1},
        {"pins": [2**63]},
        {"loaded": 1e12},
        {"reference": "\ud800"},
        {"sources": [[["", "\ud800", [1, 2, 3, 4, 5]]]]},
        {"sources": [[["", "f", [1 << 64, 2, 3, 4, 5]]]]},
        {"sources": [[["", "f", [1, 2, 1 << 63, 4, 5]]]]},
        {"origin": [["", "f", [1, 2, 3, "4", 5]]]},
        {"origin": [["", "f", [1, 2, 3, 4]]]},
    ],
)
def test_what_could_not_be_sent_is_left(kept: Keeper, values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    first_row("checkpoints", **values)(kept)
    with caplog.at_level(logging.WARNING), books(kept) as again:
        assert again.names() == {"b"}
        assert "is left" in caplog.text


def test_a_name_whose_owner_cannot_be_is_left(kept: Keeper) -> None:
    first_row("names", owner=2**32)(kept)
    with books(kept) as again:
        assert again.names() == {"b"}
