"""The event stream: what events say, who may see them, and how much it keeps."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from weightd._proto.v1 import daemon_pb2
from weightd._transport.convert import event_from
from weightd.errors import EventsLostError, InUseError
from weightd_daemon.api.daemon_service import DaemonService
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey, LostCheckpoint
from weightd_daemon.core.events import CheckpointEvicted, DeviceLost, DrainChanged, LoadBegun, LoadEnded
from weightd_daemon.core.lease import Lease, LeaseBegun, LeaseEnded, LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.monitoring import event_stream as event_stream_module
from weightd_daemon.monitoring.event_stream import MonitoringEventReader, MonitoringEventStream

ALICE, BOB, ADMIN = (
    Principal(1000, admin=False, domain="a"),
    Principal(1001, admin=False, domain="b"),
    Principal(0, admin=True, domain=""),
)
PEER = LeasePeer(1, 12, 1000, "python serve.py")
BEGUN = LoadBegun(5, PEER, "host", "a", "name")


class Desk:
    """An event stream over a store with one checkpoint of Alice."""

    def __init__(self) -> None:
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=lambda _: None)
        self.catalog = Catalog(self.store, UserLimits())
        self.event_stream = MonitoringEventStream(store=self.store, catalog=self.catalog, now=lambda: 1.5)
        key = CheckpointKey("host", "a", "sha256:" + "ab" * 32)
        self.checkpoint = Checkpoint(key, {}, {}, 300, 1000, 0.0, 0.0)
        self.store.enter(self.checkpoint)
        self.lease = Lease(9, key, PEER, 0.0, waiting=False)

    def seen(self, who: Principal) -> list[daemon_pb2.Event]:
        with self.event_stream.reader(who) as reader:
            return reader.recent


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_what_events_say(desk: Desk) -> None:
    desk.catalog.set(ALICE, "name", desk.checkpoint.key.content_digest)
    for event in (
        BEGUN, LoadEnded(BEGUN, "CAPACITY", "too large", 2.0), LoadEnded(BEGUN, "OK", "", 3.0, "sha256:cd", 30, 20, 10),
        LeaseBegun(desk.lease), LeaseEnded(desk.lease), CheckpointEvicted(desk.checkpoint, "capacity"),
    ):  # fmt: skip
        desk.event_stream.on_event(event)
    begun, failed, ended, attached, detached, evicted = desk.seen(ALICE)
    assert (begun.event_time.seconds, begun.event_time.nanos) == (1, 500_000_000)
    assert (begun.load, begun.names, begun.device, begun.pid, begun.uid) == (5, ["name"], "host", 12, 1000)
    assert (failed.reason, failed.message, failed.seconds, failed.total_bytes) == ("CAPACITY", "too large", 2.0, 0)
    assert (ended.reason, ended.total_bytes, ended.unique_bytes, ended.read_bytes) == ("OK", 30, 20, 10)
    assert ended.content_digest == "sha256:cd"
    assert (attached.lease, attached.names, attached.total_bytes) == (9, ["name"], 300)
    attached.kind = detached.kind
    assert attached == detached
    assert (evicted.reason, evicted.content_digest) == ("capacity", desk.checkpoint.key.content_digest)


def test_who_is_not_known_is_not_root_and_no_process(desk: Desk) -> None:
    stranger = replace(desk.lease, peer=LeasePeer(2, None, None, ""))
    root = replace(desk.lease, peer=LeasePeer(3, 7, 0, "sh"))
    for lease in (stranger, root):
        desk.event_stream.on_event(LeaseBegun(lease))
    found = [event_from(message) for message in desk.seen(ALICE)]
    assert [(event.pid, event.uid, event.command) for event in found] == [(None, None, ""), (7, 0, "sh")]
    assert found[0].user == "?"


def test_a_lease_on_what_is_lost_is_still_named(desk: Desk) -> None:
    desk.store.evict(desk.checkpoint, "removed")
    desk.store.lost[desk.checkpoint.key] = LostCheckpoint(desk.checkpoint, "gone")
    desk.event_stream.on_event(LeaseEnded(desk.lease))
    (event,) = desk.seen(ALICE)
    assert (event.lease, event.total_bytes) == (9, 300)


@pytest.mark.parametrize("state", ["draining", "drained", "undrained"])
def test_what_is_of_the_daemon_is_for_all(desk: Desk, state: str) -> None:
    desk.event_stream.on_event(DrainChanged(state))
    desk.event_stream.on_event(DeviceLost("GPU-1", "fell off the bus"))
    for who in (ALICE, BOB, ADMIN):
        drain, lost = desk.seen(who)
        assert daemon_pb2.EventKind.Name(drain.kind) == f"EVENT_KIND_{state.upper()}"
        assert (lost.device, lost.message) == ("GPU-1", "fell off the bus")


def test_other_users_see_nothing_and_admins_everything(desk: Desk) -> None:
    for event in (
        BEGUN,
        LoadEnded(BEGUN, "OK", "", 1.0),
        LeaseBegun(desk.lease),
        CheckpointEvicted(desk.checkpoint, "removed"),
    ):
        desk.event_stream.on_event(event)
    assert [len(desk.seen(who)) for who in (ALICE, BOB, ADMIN)] == [4, 0, 4]


def test_an_event_has_an_end(desk: Desk) -> None:
    for number in range(20):
        desk.catalog.set(ALICE, f"n{number:02}", desk.checkpoint.key.content_digest)
    desk.event_stream.on_event(LeaseBegun(desk.lease))
    desk.event_stream.on_event(LoadEnded(BEGUN, "FORMAT", "x" * 1_000_000, 1.0))
    attached, ended = desk.seen(ALICE)
    assert attached.names == [f"n{number:02}" for number in range(8)]
    assert ended.ByteSize() < 3000


def test_only_so_many_are_remembered(desk: Desk) -> None:
    for number in range(event_stream_module.REMEMBERED + 10):
        desk.event_stream.on_event(LoadBegun(number, PEER, "host", "a", ""))
    loads = [event.load for event in desk.seen(ALICE)]
    assert loads == list(range(10, event_stream_module.REMEMBERED + 10))


def test_a_reader_that_is_too_far_behind_loses_all_and_hears_how_many(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream_module, "BACKLOG", 3)

    async def read() -> None:
        with (
            desk.event_stream.reader(ALICE) as slow,
            desk.event_stream.reader(ALICE) as fast,
            desk.event_stream.reader(BOB) as other,
        ):
            for number in range(5):
                desk.event_stream.on_event(LoadBegun(number, PEER, "host", "a", ""))
                found = await fast.next(1.0)
                assert found is not None
                assert found.load == number
            with pytest.raises(EventsLostError, match=r"^5 events are lost"):
                await slow.next(1.0)
            assert await other.next(0.01) is None
            assert await fast.next(0.0) is None

    asyncio.run(read())


def test_a_reader_waits_for_what_comes(desk: Desk) -> None:
    async def read() -> None:
        with desk.event_stream.reader(ALICE) as reader:
            waiting = asyncio.ensure_future(reader.next(20.0))
            await asyncio.sleep(0)
            desk.event_stream.on_event(BEGUN)
            found = await waiting
            assert found is not None
            assert found.load == 5

    asyncio.run(read())


def test_all_readers_of_a_user_share_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many readers of each event would keep the loop from everybody else."""
    monkeypatch.setattr(event_stream_module, "BURST", 3)
    monkeypatch.setattr(event_stream_module, "PER_SECOND", 0.001)

    async def read() -> None:
        stream = Desk().event_stream
        with stream.reader(ALICE) as one, stream.reader(ALICE) as two, stream.reader(ADMIN) as other:
            for number in range(2):
                stream.on_event(LoadBegun(number, PEER, "host", "a", ""))
            async with asyncio.timeout(20.0):
                for reader in (one, two, one):
                    assert await reader.next(1.0)
                fourth = asyncio.ensure_future(two.next(1.0))
                assert await other.next(1.0)
            assert not fourth.done()
            fourth.cancel()

    asyncio.run(read())


def test_events_that_are_remembered_go_out_at_that_rate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream_module, "BURST", 2)
    monkeypatch.setattr(event_stream_module, "PER_SECOND", 0.001)

    async def read() -> None:
        stream = Desk().event_stream
        for number in range(3):
            stream.on_event(LoadBegun(number, PEER, "host", "a", ""))
        parts: Any = SimpleNamespace(event_stream=stream, caller=lambda _: (None, ALICE))
        context: Any = None
        events = aiter(DaemonService(parts).WatchEvents(daemon_pb2.WatchEventsRequest(), context))
        assert [(await anext(events)).load for _ in range(2)] == [0, 1]
        third = asyncio.ensure_future(anext(events))
        done, _ = await asyncio.wait([third], timeout=0.1)
        assert not done
        third.cancel()

    asyncio.run(read())


def test_who_has_left_gets_nothing(desk: Desk) -> None:
    with desk.event_stream.reader(ALICE) as left:
        pass
    desk.event_stream.on_event(BEGUN)
    assert asyncio.run(left.next(0.0)) is None


def test_readers_are_counted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream_module, "MOST_READERS", 1)
    with desk.event_stream.reader(ALICE) as reader:
        assert isinstance(reader, MonitoringEventReader)
        with pytest.raises(InUseError, match="1 readers"):
            desk.seen(BOB)
    assert desk.seen(BOB) == []
