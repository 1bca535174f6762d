"""Loads, without loaders: what is left of one that ends before it has one, and which files are trusted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

from support.filled import WHO, Filled
from weightd.errors import (
    CapacityError,
    DrainingError,
    FormatError,
    LeaseLostError,
    NotFoundError,
    PermissionDeniedError,
    ResourceLimitError,
    ServerError,
    WeightdError,
)
from weightd.types import FileIdentity
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.events import Event, LoadBegun, LoadEnded
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.loader.source import LoaderSource, rested
from weightd_daemon.loads.fair_queue import LoadQueue
from weightd_daemon.loads.flight import InFlightLoad
from weightd_daemon.loads.loads import Loads
from weightd_daemon.loads.request import LoadOutcome, LoadRequest


class Desk:
    """Loads over books in this process, one wish, and the events that were told."""

    def __init__(self) -> None:
        self.books = Filled(0)
        self.told: list[Event] = []
        nothing, unused = dict[str, Any](), cast("Any", None)
        self.loads = Loads(
            store=self.books.store, catalog=self.books.catalog, devices={**self.books.devices}, reclaimers=nothing,
            index=unused, prepare=unused, now=lambda: 0.0, on_event=self.hear, open_manifest=unused, lock=-1, threads=1,
            fair_queue=LoadQueue(1, 1), limits=UserLimits(),
        )  # fmt: skip
        self.wish = LoadRequest(
            who=WHO, peer=LeasePeer(1, 1, 1000, ""), sources=(), device="GPU-0", name_is_default=True
        )
        self.intake, other = os.pipe()
        os.close(other)

    def hear(self, event: Event) -> None:
        self.told.append(event)

    def check_over(self, load: InFlightLoad) -> None:
        """Nothing is left of a load, and what was told of its beginning was told of its end."""
        assert load.done.done()
        assert self.loads.under_way == []
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(self.intake)
        assert not self.books.store.open_loads
        begun = [event.load for event in self.told if isinstance(event, LoadBegun)]
        assert [event.begun.load for event in self.told if isinstance(event, LoadEnded)] == begun


def loads_of(books: Filled, limits: UserLimits) -> Loads:
    nothing, unused = dict[str, Any](), cast("Any", None)
    return Loads(
        store=books.store, catalog=books.catalog, devices=nothing, reclaimers=nothing, index=unused,
        prepare=unused, now=lambda: 5.0, on_event=unused, open_manifest=unused, lock=-1, threads=1,
        fair_queue=LoadQueue(1, 1), limits=limits,
    )  # fmt: skip


def wish_of(who: Principal, name: str, *, pin: bool = False) -> LoadRequest:
    return LoadRequest(
        who=who, peer=LeasePeer(1, 1, who.uid, ""), sources=(), device="GPU-0", name=name, name_is_default=not name,
        pin=pin, detached=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["new", "mine"])
def test_a_pin_that_is_refused_leaves_no_name_and_moves_none(name: str) -> None:
    """The user may bring so many bytes, and has; the names are as they were."""
    limits, user = UserLimits(), Principal(1001, admin=False, domain="")
    books = Filled(2, limits=limits)
    first, second = books.store.checkpoints.values()
    books.catalog.set(user, "mine", first.key.content_digest)
    books.catalog.pin_loaded(user, first)
    limits.bytes = first.total_bytes
    tags = books.catalog.tags
    with pytest.raises(CapacityError, match="the limit max_user_bytes is reached"):
        loads_of(books, limits).name_and_pin(wish_of(user, name, pin=True), second)
    assert (books.catalog.tags, second.pinned, second.last_used) == (tags, False, 0.0)


def test_a_name_that_is_refused_leaves_no_pin() -> None:
    books, user = Filled(2), Principal(1001, admin=False, domain="")
    loads, second = loads_of(books, UserLimits()), list(books.store.checkpoints.values())[1]
    with pytest.raises(PermissionDeniedError, match="name 'n0' belongs to uid 1000"):
        loads.name_and_pin(wish_of(user, "n0", pin=True), second)
    assert (second.pinned, second.last_used) == (False, 0.0)
    assert loads.name_and_pin(wish_of(user, "n1", pin=True), second) == "n1"  # it is that content's name already
    assert second.pinned


def test_a_load_that_ends_in_the_step_in_which_it_began_closes_its_intake() -> None:
    async def run() -> None:
        desk = Desk()
        load, _, begins = desk.loads.start(desk.wish, desk.intake)
        assert begins
        desk.loads.end_all(DrainingError("the daemon is draining"))
        await asyncio.sleep(0.01)
        desk.check_over(load)

    asyncio.run(run())


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises."""

    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


BUG = ZeroDivisionError("a bug")
FAULTS: dict[str, tuple[Callable[[Desk, pytest.MonkeyPatch], None], type[WeightdError]]] = {
    "no such device": (lambda desk, patch: desk.loads._devices.clear(), ServerError),
    "the books refuse": (lambda desk, patch: patch.setattr(desk.books.store, "begin_load", raising(BUG)), ServerError),
    "the books know no such device": (lambda desk, patch: desk.books.store.memories.clear(), NotFoundError),
    "telling that it begins": (lambda desk, patch: patch.setattr(desk.loads, "_on_event", raising(BUG)), ServerError),
    "its turn": (lambda desk, patch: patch.setattr(desk.loads._fair_queue, "turn", raising(BUG)), ServerError),
    "starting a loader": (lambda desk, patch: patch.setattr(desk.loads._pool, "acquire", raising(BUG)), ServerError),
    "a descriptor for a loader": (
        lambda desk, patch: patch.setattr(desk.loads._pool, "acquire", raising(OSError(errno.EMFILE, "none left"))),
        ResourceLimitError,
    ),
    "a program that is not there": (
        lambda desk, patch: patch.setattr(desk.loads._pool, "acquire", raising(FileNotFoundError())),
        ServerError,
    ),
    "somebody else's cancellation": (
        lambda desk, patch: patch.setattr(desk.loads._pool, "acquire", raising(asyncio.CancelledError())),
        LeaseLostError,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_fails_nobody_waits_for_a_load_without_end(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, expected = FAULTS[fault]

    async def run() -> None:
        desk = Desk()
        desk.loads._reclaimers["GPU-0"] = cast("Any", None)
        load, _, _ = desk.loads.start(desk.wish, desk.intake)
        make(desk, monkeypatch)
        async with asyncio.timeout(60):
            with pytest.raises(expected):
                await load.done
            assert load.task is not None
            await asyncio.wait([load.task, *desk.loads._background])
            if desk.loads._background:
                await asyncio.wait(desk.loads._background)
        with contextlib.suppress(ZeroDivisionError):  # of the listener, which fails at the end as well
            load.task.result()
        desk.check_over(load)

    asyncio.run(run())
    assert ("load failed by a bug" in caplog.text) == (expected is ServerError)


class Sealing:
    """Plays the steps of a load whose loader brings one tensor, and seals it; `found` is what it has found by then.

    That is the connections of the leases on the checkpoint, and what may be evicted, in the very step of the seal.
    """

    found: tuple[list[int], list[Checkpoint]]

    def __init__(
        self, *, store: ContentStore, loading: StoreTransaction, on_sealed: Callable[[Checkpoint], None], **_: object
    ) -> None:
        self._store, self._loading, self._on_sealed = store, loading, on_sealed
        self.checkpoint: Checkpoint | None = None
        self.books = 0

    async def serve(self, _: object) -> LoadOutcome:
        extent = self._loading.grant(4096, 4096)
        assert extent is not None
        _, blob = self._loading.settle(b"a" * 16, 4096, extent.segment, extent.offset)
        entries = (ContentTensor("", "t", "U8", (4096,), 0, 4096),)
        content = Content("sha256:aa", (ContentFile("", "f", None),), entries, (blob,))
        sealed = self.checkpoint = self._loading.seal(content, 0.0)
        self._on_sealed(sealed)
        holders = [lease.peer.connection for lease in self._store.leases_of(sealed) if lease.waiting]
        type(self).found = holders, list(self._store.evictable("GPU-0"))
        return LoadOutcome("sha256:aa", 1, 4096, 4096, 4096, 0.0)


def test_whoever_waits_for_a_load_has_a_lease_in_the_step_that_seals_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another load might evict it before anybody has attached. Who waits for nothing (detached) gets none."""

    async def run() -> set[int]:
        desk = Desk()
        desk.loads._reclaimers["GPU-0"] = cast("Any", None)
        desk.loads._devices["GPU-0"] = cast("Any", SimpleNamespace(kind="cuda_vmm", uuid="GPU-0"))
        monkeypatch.setattr("weightd_daemon.loads.reading.LoadDialogue", Sealing)
        monkeypatch.setattr(desk.loads, "_pool", AsyncMock())
        load, _, begins = desk.loads.start(desk.wish, desk.intake)
        assert begins
        for connection, detached in ((2, False), (3, True)):
            wish = replace(desk.wish, peer=LeasePeer(connection, 1, 1000, ""), detached=detached)
            assert desk.loads.start(wish, -1)[0] is load
        async with asyncio.timeout(60):
            await load.done
            assert load.task is not None
            await asyncio.wait([load.task])
            if desk.loads._background:
                await asyncio.wait(desk.loads._background)
        desk.check_over(load)
        return {lease.peer.connection for lease in desk.books.store.leases}

    assert asyncio.run(run()) == {1, 2}
    assert Sealing.found == ([1, 2], [])


def test_a_load_takes_no_less_than_no_time_when_the_clock_is_set_back() -> None:
    async def run() -> list[Event]:
        books, events = Filled(0), list[Event]()
        backwards = count(10**9, -3600)
        anything: Any = None
        device = cast("Any", SimpleNamespace(kind="cuda_vmm", uuid="GPU-0"))
        lock = os.open(os.devnull, os.O_RDONLY)
        loads = Loads(
            store=books.store, catalog=books.catalog, devices={"GPU-0": device}, reclaimers={"GPU-0": anything},
            index=anything, prepare=anything, now=lambda: float(next(backwards)), on_event=events.append,
            open_manifest=anything, lock=lock, threads=1, fair_queue=LoadQueue(1, 1), limits=UserLimits(),
            argv=["/bin/false"],
        )  # fmt: skip
        intake, other = os.pipe()
        os.close(other)
        wish = LoadRequest(who=WHO, peer=LeasePeer(1, 1, 1000, ""), sources=(), device="GPU-0")
        load, _, _ = loads.start(wish, intake)
        with pytest.raises(LeaseLostError, match="the loader process of this load died"):
            await load.done
        await loads.close()
        os.close(lock)
        return events

    begun, ended = asyncio.run(run())
    assert isinstance(begun, LoadBegun)
    assert isinstance(ended, LoadEnded)
    assert 0 <= ended.seconds < 60


NOW = 1_800_000_000 * 10**9
SECOND = 10**9


@pytest.mark.parametrize(
    ("ctime", "mtime", "expected"),
    [
        (NOW - 2 * SECOND, 0, True),
        (NOW - SECOND, 0, False),
        (NOW + SECOND, 0, False),
        (NOW + 3600 * SECOND, 0, True),  # the clock was set back since: a change made now has a ctime of now
        (NOW - 3600 * SECOND, NOW, True),  # mtime anybody may set
        (NOW - 3600 * SECOND, NOW + 3600 * SECOND, True),
    ],
)
def test_an_identity_stands_for_a_content_where_a_change_made_now_would_show(
    ctime: int, mtime: int, expected: bool
) -> None:
    assert rested(FileIdentity(1, 2, 3, mtime, ctime), NOW) is expected


@pytest.mark.parametrize(("away", "expected"), [(0, False), (-3600, True), (3600, True)])
def test_a_file_is_trusted_whichever_way_the_clock_was_stepped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: int, expected: bool
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"bytes")
    now = path.stat().st_ctime_ns + away * SECOND
    monkeypatch.setattr("time.time_ns", lambda: now)
    monkeypatch.setattr("weightd_daemon.loader.source.filesystem_type", lambda _: 0x01021994)  # tmpfs
    with path.open("rb") as file:
        assert LoaderSource("a", file.fileno()).trusted is expected


CHANGES: dict[str, Callable[[Path], object]] = {
    "overwritten in place": lambda path: path.write_bytes(b"other"),
    "longer": lambda path: path.write_bytes(b"bytes and more"),
    "shorter": lambda path: os.truncate(path, 3),
    "a time set back": lambda path: os.utime(path, ns=(5, 5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_since_it_was_opened_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"bytes")
    os.utime(path, ns=(1, 1))  # so that no change has the same time, however long the clock's ticks are
    with path.open("rb") as file:
        source = LoaderSource("a", file.fileno())
        source.check_unchanged()
        CHANGES[change](path)
        with pytest.raises(FormatError, match="a: changed while it was read; load it again"):
            source.check_unchanged()
