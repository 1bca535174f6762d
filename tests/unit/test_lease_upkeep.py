"""Lease files, their count and their sweep where something ends early: no descriptor and no file is left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Never

import pytest

from support.descriptors import open_descriptors
from weightd_daemon.core.checkpoint import CheckpointKey
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.handles.lease_files import HandleLeaseFiles, HandleLeaseOwner
from weightd_daemon.handles.lease_locks import HandleLeaseLocks
from weightd_daemon.handles.lease_sweep import HandleLeaseSweep
from weightd_daemon.handles.manifest_file import is_manifest, make_manifest
from weightd_daemon.handles.manifests import ManifestHandles

ALICE = HandleLeaseOwner(1001, "")
KEY = CheckpointKey("host", "", "sha256:" + "ab" * 32)


class Shelf:
    """Lease files, and the manifest of one checkpoint."""

    def __init__(self) -> None:
        self.files, self.manifests = HandleLeaseFiles(), ManifestHandles()
        self.manifests.add(KEY, make_manifest(b"m"))
        self.locks = HandleLeaseLocks(self.manifests, self.files)


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    """Lease files that nobody keeps, and a manifest."""
    made = Shelf()
    yield made
    made.files.close()
    made.manifests.close()


def test_locks_are_counted_on_files_and_manifests(shelf: Shelf) -> None:
    assert shelf.locks.room(ALICE) is None
    held = [shelf.locks.lock(KEY, number, ALICE if number < 3 else None) for number in range(1, 5)]
    before = open_descriptors()
    assert asyncio.run(shelf.locks.count_locks()) == 4
    for one in held[1:]:
        one.close()
    assert asyncio.run(shelf.locks.count_locks()) == 1
    held[0].close()
    assert len(open_descriptors()) == len(before) - 6, "and of the count none is left"


def test_a_count_without_descriptors_leaves_none(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shelf.locks.room(ALICE) is None
    duplicate, made = os.dup, []

    def once(descriptor: int) -> int:
        if made:
            raise OSError(24, "Too many open files")
        made.append(duplicate(descriptor))
        return made[-1]

    before = open_descriptors()
    monkeypatch.setattr(os, "dup", once)
    with pytest.raises(OSError, match="Too many open files"):
        asyncio.run(shelf.locks.count_locks())
    assert open_descriptors() == before


def test_a_manifest_that_cannot_be_opened_takes_the_lease_along(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: CheckpointKey) -> Never:
        raise OSError(24, "Too many open files")

    assert shelf.locks.room(ALICE) is None
    before = open_descriptors()
    monkeypatch.setattr(shelf.manifests, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        shelf.locks.lock(KEY, 1, ALICE)
    assert open_descriptors() == before
    assert shelf.files.is_locked(1) is False


def test_a_file_that_nobody_keeps_goes_when_it_has_no_lease_any_more(shelf: Shelf) -> None:
    before = open_descriptors()
    assert shelf.locks.room(ALICE) is None
    shelf.locks.lock(KEY, 1, ALICE).close()
    shelf.locks.forget(1)
    for _ in range(2):
        shelf.files.tidy()
    assert (len(shelf.files), open_descriptors()) == (0, before)


def test_who_leaves_while_its_file_is_being_kept_leaves_none(shelf: Shelf) -> None:
    class Slow:
        """A service manager that does not answer."""

        stores = True

        def __init__(self) -> None:
            self.told: list[str] = []
            self.asked = asyncio.Event()

        async def store(self, name: str, descriptor: int) -> None:
            self.told.append(f"store {name}")
            self.asked.set()
            await asyncio.Event().wait()

        def drop(self, name: str) -> None:
            self.told.append(f"drop {name}")

    async def run() -> list[str]:
        manager = Slow()
        shelf.files.store_in(manager)
        waiting = shelf.files.room(ALICE)
        assert waiting is not None
        task = asyncio.ensure_future(waiting)
        await manager.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return manager.told

    before = open_descriptors()
    assert asyncio.run(run()) == ["store lck.1.1001.", "drop lck.1.1001."]
    assert (len(shelf.files), open_descriptors()) == (0, before)


def test_a_sweep_ends_whenever_it_is_told_to(shelf: Shelf) -> None:
    """Also before it has begun, and before it has tidied for the first time."""

    async def run() -> None:
        leases = LeaseTable(lambda _: True)
        await HandleLeaseSweep(leases, shelf.files).close()
        sweep = HandleLeaseSweep(leases, shelf.files)
        sweep.begin()
        for _ in range(3):
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await sweep.close()

    asyncio.run(run())


def test_what_is_no_memfd_is_no_manifest() -> None:
    with open(os.devnull, "rb") as null:
        assert not is_manifest(null.fileno())
