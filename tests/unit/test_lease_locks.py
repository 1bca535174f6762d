"""Leases as the kernel's locks on manifests: who holds one, how long, and what a look at one sees of the others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator

import pytest

from support.limits import room_for
from weightd_daemon.core.checkpoint import CheckpointKey, Content
from weightd_daemon.core.lease import Lease, LeasePeer
from weightd_daemon.handles import kernel_locks, lease_locks
from weightd_daemon.handles.lease_files import HandleLeaseFiles, HandleLeaseOwner
from weightd_daemon.handles.lease_locks import HandleLeaseLocks
from weightd_daemon.handles.manifest_file import encode_manifest, is_manifest, make_manifest
from weightd_daemon.handles.manifests import LOCK_BASE, ManifestHandles

KEY = CheckpointKey("host", "", "sha256:" + "ab" * 32)
OTHER = KEY._replace(content_digest="sha256:" + "cd" * 32)
FLOCK = struct.Struct("hhqqi4x")


@pytest.fixture
def manifests() -> Iterator[ManifestHandles]:
    """Manifests of two checkpoints."""
    made = ManifestHandles()
    for key in (KEY, OTHER):
        encoded = encode_manifest(Content(key.content_digest, (), (), ()), "host", "host", lambda _: 0)
        made.add(key, make_manifest(encoded))
    yield made
    made.close()


@pytest.fixture
def hold(manifests: ManifestHandles) -> Iterator[Callable[..., int]]:
    """Take the lock of a lease; the descriptor is closed at the end, if not before."""
    held: list[int] = []

    def take(number: int, key: CheckpointKey = KEY) -> int:
        held.append(manifests.lock(key, number))
        return held[-1]

    yield take
    for descriptor in held:
        try:
            os.close(descriptor)
        except OSError as error:
            assert error.errno == errno.EBADF  # noqa: PT017  # closed by the test


def lease(number: int, key: CheckpointKey = KEY) -> Lease:
    return Lease(number, key, LeasePeer(1, 2, 3, "python"), 0.0, waiting=False)


def lock_bytes(descriptor: int, start: int, length: int) -> None:
    """Lock bytes as a client could that was lent the descriptor; length 0 is to the end of all files."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, length, 0))


def test_a_lease_is_held_until_its_descriptor_is_closed(manifests: ManifestHandles, hold: Callable[..., int]) -> None:
    assert not manifests.is_locked(lease(5))
    descriptor = hold(5)
    assert manifests.is_locked(lease(5))
    os.close(descriptor)
    assert not manifests.is_locked(lease(5))


@pytest.mark.parametrize("ended", [1, 2, 3])
def test_a_lease_is_seen_alone_whatever_others_are_held(
    manifests: ManifestHandles, hold: Callable[..., int], ended: int
) -> None:
    held = {number: hold(number) for number in (1, 2, 3)}
    os.close(held[ended])
    assert [manifests.is_locked(lease(number)) for number in (1, 2, 3)] == [number != ended for number in (1, 2, 3)]
    assert not manifests.is_locked(lease(4))


def test_a_lease_on_another_manifest_is_another_lease(manifests: ManifestHandles, hold: Callable[..., int]) -> None:
    hold(7, OTHER)
    assert not manifests.is_locked(lease(7))
    assert manifests.is_locked(lease(7, OTHER))


def test_a_mapping_holds_the_lease_when_the_descriptor_is_closed(
    manifests: ManifestHandles, hold: Callable[..., int]
) -> None:
    descriptor = hold(5)
    mapping = mmap.mmap(descriptor, manifests.size(KEY), prot=mmap.PROT_READ)  # keeps a descriptor of its own
    os.close(descriptor)
    assert manifests.is_locked(lease(5))
    mapping.close()
    assert not manifests.is_locked(lease(5))


def test_a_duplicate_holds_the_lease_and_another_opening_does_not(
    manifests: ManifestHandles, hold: Callable[..., int]
) -> None:
    descriptor = hold(5)
    duplicate, again = os.dup(descriptor), os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    os.close(descriptor)
    assert manifests.is_locked(lease(5))
    os.close(duplicate)
    assert not manifests.is_locked(lease(5))
    os.close(again)


def test_a_forked_child_holds_the_lease_of_its_parent(manifests: ManifestHandles, hold: Callable[..., int]) -> None:
    descriptor = hold(5)
    end, ends = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ends)
        os.read(end, 1)  # until the parent has closed its side
        os._exit(0)
    os.close(end)
    try:
        os.close(descriptor)
        assert manifests.is_locked(lease(5))
    finally:
        os.close(ends)
        os.waitpid(child, 0)
    assert not manifests.is_locked(lease(5))


def test_what_is_lent_can_be_read_and_nothing_else(manifests: ManifestHandles, hold: Callable[..., int]) -> None:
    descriptor = hold(5)
    assert len(os.pread(descriptor, 1 << 20, 0)) == manifests.size(KEY) > 0
    assert is_manifest(descriptor)
    for change in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, 0)):
        with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument|not permitted"):
            change()


def test_locks_before_and_behind_a_lease_do_not_hold_it(manifests: ManifestHandles, hold: Callable[..., int]) -> None:
    descriptor = hold(5)
    lock_bytes(descriptor, 0, LOCK_BASE + 4)
    lock_bytes(descriptor, LOCK_BASE + 7, 0)
    assert [manifests.is_locked(lease(number)) for number in (4, 5, 6)] == [False, True, False]


def test_a_lease_of_what_is_gone_is_not_held(manifests: ManifestHandles, hold: Callable[..., int]) -> None:
    hold(5)
    manifests.remove(KEY)
    assert not manifests.is_locked(lease(5))
    with pytest.raises(KeyError):
        manifests.lock(KEY, 6)


def test_the_number_is_told_before_its_lock_is_there() -> None:
    told: list[tuple[int, bool]] = []
    manifests = ManifestHandles(before_lock=lambda number: told.append((number, manifests.is_locked(lease(number)))))
    manifests.add(KEY, make_manifest(b""))
    locks = HandleLeaseLocks(manifests, HandleLeaseFiles())
    for number, owner in (
        (5, None),
        (6, HandleLeaseOwner(1000, "")),
        (7, HandleLeaseOwner(1000, "elsewhere")),
    ):  # no file is there for any
        locks.lock(KEY, number, owner).close()
    assert told == [(5, False), (6, False), (7, False)]
    manifests.close()


def test_a_lock_that_the_kernel_refuses_costs_no_descriptor(
    manifests: ManifestHandles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="No locks available"):
        manifests.lock(KEY, 5)
    assert os.listdir("/proc/self/fd") == before


# -- leases of an earlier daemon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[], [1], [9], [1, 2, 3], [2, 5, 9], [1, 9]])
def test_the_next_daemon_finds_each_lease_by_its_lock(
    manifests: ManifestHandles, hold: Callable[..., int], numbers: list[int]
) -> None:
    hold(10)  # past those that are looked for
    for number in numbers:
        hold(number)
    assert manifests.inherited(KEY, 9) == numbers
    assert manifests.inherited(OTHER, 9) == []


@pytest.mark.parametrize(("start", "length"), [(1, 3), (4, 0), (1, 0)])
def test_a_lock_on_several_bytes_is_nobodys_lease_and_hides_others(
    manifests: ManifestHandles, hold: Callable[..., int], start: int, length: int
) -> None:
    descriptor = hold(5)
    lock_bytes(descriptor, LOCK_BASE + start, length)
    assert manifests.inherited(KEY, 9) is None


def test_leases_that_cannot_be_told_apart_count_as_one_until_the_last_has_gone(
    manifests: ManifestHandles, hold: Callable[..., int]
) -> None:
    held = [hold(2), hold(4)]
    manifests.hold_as_one(KEY, 11, 9)
    new = hold(12)
    for descriptor in held:
        assert manifests.is_locked(lease(11))
        os.close(descriptor)
    assert not manifests.is_locked(lease(11)), "a lease of this daemon is none of theirs"
    assert manifests.is_locked(lease(12))
    os.close(new)
    assert not manifests.is_locked(lease(12))


def test_very_many_do_not_hold_up_the_start(
    manifests: ManifestHandles, hold: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 9, 2):
        hold(number)
    monkeypatch.setattr(kernel_locks, "LOOK_SECONDS", -1.0)
    assert manifests.inherited(KEY, 9) is None


# -- counting ----------------------------------------------------------------------------------------------------------


def test_locks_are_counted_with_few_descriptors_left(manifests: ManifestHandles) -> None:
    files, held = HandleLeaseFiles(), []
    for uid in range(3 * lease_locks.COUNTED_AT_ONCE):
        owner = HandleLeaseOwner(uid, "")
        assert files.room(owner) is None
        held.append(files.lock(owner, 7, uid + 1))
    with room_for(os.getpid(), lease_locks.COUNTED_AT_ONCE + 16):
        assert asyncio.run(HandleLeaseLocks(manifests, files).count_locks()) == len(held)
    for descriptor in held:
        assert descriptor is not None
        os.close(descriptor)
    files.close()


def test_what_is_removed_before_its_turn_is_not_counted(
    manifests: ManifestHandles, hold: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(1)
    hold(2, OTHER)
    look = kernel_locks.locked_bytes

    def removing(*where: int) -> list[int]:
        with contextlib.suppress(KeyError):  # it has gone
            manifests.remove(OTHER)
        return look(*where)

    monkeypatch.setattr(lease_locks, "COUNTED_AT_ONCE", 1)
    monkeypatch.setattr(lease_locks, "locked_bytes", removing)
    assert asyncio.run(HandleLeaseLocks(manifests, HandleLeaseFiles()).count_locks()) == 1
