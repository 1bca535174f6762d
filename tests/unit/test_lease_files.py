"""Lease files: whose lease a lock is, that nobody can hold another user's, and what the next daemon finds."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Awaitable, Callable, Iterator

import pytest

from support.descriptors import open_descriptors
from weightd._mapping.host import map_lease
from weightd_daemon.core.checkpoint import CheckpointKey
from weightd_daemon.core.lease import Lease, LeasePeer, LeaseTable
from weightd_daemon.handles import kernel_locks, lease_files
from weightd_daemon.handles.lease_files import FILE_LEASES, HandleLeaseFiles, HandleLeaseOwner
from weightd_daemon.handles.lease_locks import HandleLeaseLocks
from weightd_daemon.handles.lease_sweep import HandleLeaseSweep
from weightd_daemon.handles.manifest_file import make_manifest
from weightd_daemon.handles.manifests import ManifestHandles

ALICE, BOB = HandleLeaseOwner(1001, ""), HandleLeaseOwner(1002, "")
KEY = CheckpointKey("host", "", "sha256:" + "ab" * 32)
OTHER = KEY._replace(content_digest="sha256:" + "cd" * 32)
FLOCK = struct.Struct("hhqqi4x")


def lock_bytes(descriptor: int, start: int, length: int) -> None:
    """Lock bytes as a client could that was lent the descriptor; length 0 is to the end of all files."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, length, 0))


class Kept:
    """A service manager's store, and the lease files that use it."""

    def __init__(self) -> None:
        self.there: dict[str, int] = {}
        self.listens = True
        self.broken = False
        self.asked = 0
        self.files = HandleLeaseFiles()
        self.files.store_in(self)

    @property
    def stores(self) -> bool:
        return self.listens

    async def store(self, name: str, descriptor: int) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.broken:
            raise OSError("it has no room")
        self.there[name] = os.dup(descriptor)

    def drop(self, name: str) -> None:
        if name in self.there:
            os.close(self.there.pop(name))

    def room(self, owner: HandleLeaseOwner = ALICE) -> None:
        waiting = self.files.room(owner)
        if waiting is not None:
            asyncio.run(_finish(waiting))

    def lock(self, lease: int, owner: HandleLeaseOwner = ALICE, checkpoint: int = 7) -> int:
        self.room(owner)
        descriptor = self.files.lock(owner, checkpoint, lease)
        assert descriptor is not None
        return descriptor

    def next(self) -> Kept:
        """The next daemon's files: this one's process has ended."""
        self.files.close()
        made = Kept()
        made.there = self.there
        return made

    def adopt(self, kept: dict[CheckpointKey, int], leases: LeaseTable, last: int = 1000) -> set[str]:
        given = {name: os.dup(descriptor) for name, descriptor in self.there.items()}
        taken = self.files.adopt(given, kept, leases, last, 9.0)
        for name in given.keys() - taken:
            os.close(given[name])
        return taken

    def close(self) -> None:
        self.files.close()
        for name in list(self.there):
            self.drop(name)


async def _finish(waiting: Awaitable[None]) -> None:
    await waiting


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.close()


@pytest.fixture
def locks(kept: Kept) -> Iterator[HandleLeaseLocks]:
    """The locks of two checkpoints, kept as 7 and 8."""
    manifests = ManifestHandles()
    for number, key in ((7, KEY), (8, OTHER)):
        manifests.add(key, make_manifest(b"m"), number=number)
    yield HandleLeaseLocks(manifests, kept.files)
    manifests.close()


def lease(number: int, key: CheckpointKey = KEY) -> Lease:
    return Lease(number, key, LeasePeer(1, 2, 3, "python"), 0.0, waiting=False)


def test_a_lease_is_held_until_its_last_mapping_or_descriptor_is_gone(kept: Kept) -> None:
    descriptor = kept.lock(5)
    mapping = map_lease(descriptor, mmap.PAGESIZE)  # past the end: nobody reads it
    os.close(descriptor)
    assert kept.files.is_locked(5)
    mapping.close()
    assert kept.files.is_locked(5) is False
    kept.files.forget(5)
    assert kept.files.is_locked(5) is None


@pytest.mark.parametrize("ended", [1, 2, 3])
def test_a_lease_is_seen_alone_whatever_others_are_held(kept: Kept, ended: int) -> None:
    """Also later ones: a look that went on to the end of the file would see those."""
    held = {number: kept.lock(number) for number in (1, 2, 3)}
    os.close(held.pop(ended))
    assert [kept.files.is_locked(number) for number in (1, 2, 3)] == [number != ended for number in (1, 2, 3)]
    for descriptor in held.values():
        os.close(descriptor)


def test_the_daemon_keeps_no_descriptor_of_a_lease(kept: Kept) -> None:
    kept.room()
    before = len(open_descriptors())
    descriptor = kept.lock(5)
    assert len(open_descriptors()) == before + 1, "the one that goes to the client"
    os.close(descriptor)
    assert kept.files.is_locked(5) is False


def test_nobody_holds_the_lease_of_another_user(locks: HandleLeaseLocks, kept: Kept) -> None:
    """Alice locks everything on all that she was lent: Bob's leases end with his own locks, and hers are hers."""
    for owner in (ALICE, BOB):
        kept.room(owner)
    hers, his = locks.lock(KEY, 1, ALICE), locks.lock(KEY, 2, BOB)
    assert None not in (hers.lease, his.lease)
    for descriptor in hers:
        assert descriptor is not None
        lock_bytes(descriptor, 0, 0)
    assert locks.is_locked(lease(2))
    his.close()
    assert not locks.is_locked(lease(2))
    assert locks.is_locked(lease(1))
    hers.close()
    assert not locks.is_locked(lease(1))


def test_a_client_of_0_1_and_an_admin_elsewhere_lock_the_manifest(locks: HandleLeaseLocks, kept: Kept) -> None:
    kept.room()
    foreign = HandleLeaseOwner(0, "uid-0")
    kept.room(foreign)
    for number, owner in ((1, None), (2, foreign)):
        locked = locks.lock(KEY, number, owner)
        assert locked.lease is None
        assert locks.is_locked(lease(number))
        locked.close()
        assert not locks.is_locked(lease(number))


def test_a_lease_without_a_file_locks_the_manifest(locks: HandleLeaseLocks, kept: Kept) -> None:
    kept.broken = True
    kept.room()
    locked = locks.lock(KEY, 1, ALICE)
    assert locked.lease is None
    assert locks.is_locked(lease(1))
    locked.close()
    kept.room(BOB)
    assert kept.asked == 1, "the service manager is not asked with each attach"


def test_what_is_lent_can_be_changed_by_nobody(kept: Kept) -> None:
    descriptor = kept.lock(5)
    for change in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, 1)):
        with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument|not permitted"):
            change()
    assert os.fstat(descriptor).st_mode & 0o777 == 0o400
    os.close(descriptor)


def test_a_file_has_few_locks_and_is_removed_when_it_has_none_for_a_while(kept: Kept) -> None:
    held = [kept.lock(number) for number in range(1, 2 * FILE_LEASES + 2)]
    assert (len(kept.files), len(kept.there)) == (3, 3)
    for number, descriptor in enumerate(held, 1):
        os.close(descriptor)
        kept.files.forget(number)
    kept.files.tidy()
    assert len(kept.there) == 3, "the next lease may come at once"
    os.close(kept.lock(1000))
    kept.files.tidy()
    assert len(kept.there) == 1
    kept.files.forget(1000)
    for _ in range(2):
        kept.files.tidy()
    assert (len(kept.files), kept.there) == (0, {})


def test_without_a_service_manager_nothing_is_awaited_or_kept(kept: Kept) -> None:
    kept.listens = False
    assert kept.files.room(ALICE) is None
    descriptor = kept.files.lock(ALICE, 0, 1)
    assert descriptor is not None
    os.close(descriptor)
    kept.files.forget(1)
    assert len(kept.files) == 1, "the next lease may come at once, and a file takes as long to make as the lease"
    for _ in range(2):
        kept.files.tidy()
    assert (len(kept.files), kept.asked) == (0, 0)


@pytest.mark.parametrize("listens", [True, False])
def test_who_attaches_again_and_again_has_one_file(kept: Kept, listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.listens = listens
    made: list[str] = []
    make = lease_files.make_sealed
    monkeypatch.setattr(lease_files, "make_sealed", lambda name: (made.append(name), make(name))[1])
    for number in range(1, 6):
        os.close(kept.lock(number))
        kept.files.forget(number)
        kept.files.tidy()
    assert made == ["weightd-lease"]


def test_a_lease_is_given_when_its_file_is_kept_and_not_before(kept: Kept) -> None:
    waiting = kept.files.room(ALICE)
    assert waiting is not None
    assert kept.files.lock(ALICE, 7, 1) is None

    async def both() -> None:
        await asyncio.gather(_finish(waiting), _finish(kept.files.room(ALICE) or asyncio.sleep(0)))

    asyncio.run(both())
    assert kept.asked == 1, "two who wait want one file"
    assert kept.files.room(ALICE) is None


def test_a_file_that_the_kernel_refuses_costs_no_descriptor(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.room()

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    before = open_descriptors()
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="No locks available"):
        kept.files.lock(ALICE, 7, 5)
    with pytest.raises(OSError, match="No locks available"):
        kept.room(BOB)
    assert open_descriptors() == before


# -- leases of an earlier daemon ---------------------------------------------------------------------------------------


def found(leases: LeaseTable) -> set[tuple[int, CheckpointKey, int | None]]:
    return {(one.number, one.checkpoint, one.peer.uid) for one in leases}  # type: ignore[misc]  # keys of this file


def test_the_next_daemon_finds_each_lease_and_whose_it_is(kept: Kept) -> None:
    held = [kept.lock(5), kept.lock(6, BOB), kept.lock(8, BOB, 8), kept.lock(9, ALICE, 8), kept.lock(10, ALICE, 99)]
    gone = kept.lock(7)
    os.close(gone)
    after = kept.next()
    leases = LeaseTable(lambda one: bool(after.files.is_locked(one.number)), forget=after.files.forget)
    assert len(after.adopt({KEY: 7, OTHER: 8}, leases)) == 2
    assert found(leases) == {(5, KEY, 1001), (6, KEY, 1002), (8, OTHER, 1002), (9, OTHER, 1001)}
    assert {one.peer.pid for one in leases} == {None}
    os.close(held.pop(0))
    assert [one.number for one in leases.refresh()] == [6, 8, 9]
    more = after.lock(11)
    assert len(after.there) == 2, "there is room in the files that were taken up"
    for descriptor in (more, *held):
        os.close(descriptor)
    assert leases.refresh() == []
    after.files.close()


def test_a_user_holds_only_what_it_could_be_lent(kept: Kept) -> None:
    """Locks on checkpoints of other domains, or with numbers that no daemon gave, are nobody's leases."""
    mine, shared = HandleLeaseOwner(1001, "uid-1001"), HandleLeaseOwner(1001, "")
    descriptors = [kept.lock(5, mine, 7), kept.lock(5000, shared, 7), kept.lock(6, shared, 7)]
    after = kept.next()
    leases = LeaseTable(lambda one: bool(after.files.is_locked(one.number)))
    after.adopt({KEY: 7}, leases, last=1000)
    assert found(leases) == {(6, KEY, 1001)}
    for descriptor in descriptors:
        os.close(descriptor)
    after.files.close()


@pytest.mark.parametrize("start", [0, (7 << 36) + 1])
def test_what_a_user_hides_stays_held_until_none_is_left(kept: Kept, start: int) -> None:
    hidden, wide, his = kept.lock(5), kept.lock(6), kept.lock(7, BOB)
    lock_bytes(wide, start, 0)
    after = kept.next()
    leases = LeaseTable(lambda one: bool(after.files.is_locked(one.number)), forget=after.files.forget)
    leases.number_above(1000)
    after.adopt({KEY: 7, OTHER: 8}, leases)
    assert sorted((one.checkpoint, one.peer.uid) for one in leases.refresh()) == sorted(
        [(KEY, 1001), (OTHER, 1001), (KEY, 1002)]  # type: ignore[list-item]  # keys are hashable only
    )
    os.close(his)
    assert {one.peer.uid for one in leases.refresh()} == {1001}, "his own has ended"
    new = after.lock(2000)
    os.close(wide)
    assert leases.is_held(KEY), "the one that it has hidden"
    assert not leases.is_held(OTHER)
    os.close(hidden)
    assert not leases.is_held(KEY), "a lease of this daemon is none of theirs"
    assert after.files.is_locked(2000)
    os.close(new)
    after.files.close()


def test_very_many_locks_do_not_hold_up_the_start(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = kept.lock(5)
    for at in range(1 << 20, (1 << 20) + 200, 2):
        lock_bytes(descriptor, at, 1)
    monkeypatch.setattr(kernel_locks, "LOOK_SECONDS", -1.0)
    after = kept.next()
    leases = LeaseTable(lambda one: bool(after.files.is_locked(one.number)))
    after.adopt({KEY: 7, OTHER: 8}, leases)
    assert {one.checkpoint for one in leases} == {KEY, OTHER}, "whatever it may hold counts as held"
    leases.refresh()
    assert {one.checkpoint for one in leases} == {KEY}, "and is looked at"
    os.close(descriptor)
    after.files.close()


def test_a_number_on_two_files_takes_a_lease_from_nobody(kept: Kept) -> None:
    hers, his = kept.lock(5), kept.lock(8, BOB)
    lock_bytes(hers, (7 << 36) + 8, 1)
    after = kept.next()
    leases = LeaseTable(lambda one: bool(after.files.is_locked(one.number)), forget=after.files.forget)
    leases.number_above(1000)
    after.adopt({KEY: 7}, leases)
    assert sorted(one.peer.uid or 0 for one in leases) == [1001, 1001, 1002]
    os.close(hers)
    assert [one.peer.uid for one in leases.refresh()] == [1002]
    os.close(his)
    assert leases.refresh() == []
    after.files.close()


@pytest.mark.parametrize("name", ["lck.1.1001", "lck.1.-1.", "lck.1.1001.:", "lck.x.1001.", "man.1", ""])
def test_what_is_no_lease_file_is_left(kept: Kept, name: str) -> None:
    os.close(kept.lock(5))
    after = kept.next()
    kept.there[name] = kept.there.pop(next(iter(kept.there)))
    assert after.adopt({KEY: 7}, LeaseTable(lambda _: True)) == set()
    after.files.close()


def test_a_file_that_anybody_could_write_to_is_left(kept: Kept) -> None:
    kept.there["lck.1.1001."] = os.memfd_create("weightd-lease")
    assert kept.adopt({KEY: 7}, LeaseTable(lambda _: True)) == set()


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_the_sweep_finds_what_has_ended_and_removes_its_file(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightd_daemon.handles import lease_sweep

    monkeypatch.setattr(lease_sweep, "PAUSE_SECONDS", 0.0)
    leases = LeaseTable(lambda one: bool(kept.files.is_locked(one.number)), forget=kept.files.forget)
    held = [kept.lock(leases.begin(KEY, LeasePeer(1, 2, 1001, ""), 0.0).number) for _ in range(3)]
    os.close(held.pop(1))

    async def swept(until: Callable[[], bool]) -> None:
        sweep = HandleLeaseSweep(leases, kept.files)
        sweep.begin()
        async with asyncio.timeout(60):
            while not until():  # noqa: ASYNC110  # it sets no event
                await asyncio.sleep(0)
        await sweep.close()

    asyncio.run(swept(lambda: [one.number for one in leases] == [1, 3]))
    for descriptor in held:
        os.close(descriptor)
    asyncio.run(swept(lambda: not len(leases) and not kept.there))
