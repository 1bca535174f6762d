"""Listeners that fail: the books do not notice, the others hear everything, and nobody is left with stale answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any, get_args

import pytest

from support.filled import WHO
from support.prompt_memory import PromptMemory
from support.sealed import sealed_blobs
from weightd.errors import ServerError
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Content
from weightd_daemon.core.events import (
    DeviceAbsent,
    DeviceBack,
    DeviceLost,
    DrainChanged,
    Event,
    LoadAnswered,
    LoadBegun,
    LoadEnded,
)
from weightd_daemon.core.lease import Lease, LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.store import ContentStore
from weightd_daemon.monitoring.event_stream import MonitoringEventStream
from weightd_daemon.monitoring.listeners import EventListeners

EVENTS = get_args(Event)
PEER = LeasePeer(1, 12, 1000, "python serve.py")


class Ear:
    """Remembers what it hears, until it is told of `fatal`."""

    def __init__(self, fatal: type | None = None) -> None:
        self.heard: list[str] = []
        self.cut = False
        self._fatal = fatal

    def on_event(self, event: Event) -> None:
        assert not self.cut, "it hears nothing more"
        if self._fatal is not None and isinstance(event, self._fatal):
            raise ValueError("Value out of range: -1294967296")
        self.heard.append(type(event).__name__)

    def cut_off(self) -> None:
        self.cut = True


class Books:
    """A store and its leases, told as the daemon tells: from the midst of the changes."""

    def __init__(self, *ears: Any) -> None:
        self.listeners = EventListeners()
        for ear in ears:
            self.listeners.add(ear)
        self.locked: set[int] = set()
        publish = self.listeners.publish
        self.store = ContentStore(leases=LeaseTable(self._is_locked, publish), on_event=publish)
        numbers = count()
        self.store.memories["host"] = PromptMemory(
            budget=1 << 20, page=4096, sparse=True, pool_limit=0, create=lambda _: next(numbers)
        )
        self.catalog = Catalog(self.store, UserLimits(), on_event=publish)

    def load(self, name: str) -> None:
        load = StoreTransaction(self.store, "host", "", 1000)
        begun = LoadBegun(load.number, PEER, "host", "", name)
        self.listeners.publish(begun)
        extent = load.grant(4096, 4096)
        assert extent is not None
        blob = load.settle(name.encode().ljust(16), 4096, extent.segment, extent.offset)[1]
        content = Content(
            f"sha256:{ord(name):064x}", (ContentFile("", "f", None),),
            (ContentTensor("", "t", "U8", (4096,), 0, 4096),), (blob,),
        )  # fmt: skip
        load.seal(content, 0.0)
        load.end()
        self.catalog.set(WHO, name, content.content_digest)
        self.listeners.publish(LoadEnded(begun, "OK", "", 1.0, content.content_digest, 4096, 4096, 4096))

    def everything_happens(self) -> list[object]:
        """Every kind of event, twice where that can be; what the books say after each step."""
        said: list[object] = []
        for name in "abc":
            self.load(name)
            said.append(self.say())
        self.listeners.publish(LoadAnswered(self.catalog.find(WHO, "a"), PEER, "a"))
        leases = [self.store.leases.begin(self.catalog.find(WHO, name).key, PEER, 0.0) for name in "abb"]
        self.locked = {lease.number for lease in leases}
        said.append(self.say())
        self.locked.clear()
        said += [len(self.store.leases.refresh()), self.say()]
        said += [self.store.remove(self.catalog.find(WHO, "a")), self.say()]
        self.locked = {self.store.leases.begin(self.catalog.find(WHO, "b").key, PEER, 0.0).number}
        self.listeners.publish(DrainChanged("draining"))
        said += [self.store.remove(self.catalog.find(WHO, "c")), self.say()]
        self.listeners.publish(DeviceLost("host", "gone"))
        said += [len(self.store.lose("host", "gone")), self.say()]
        self.listeners.publish(DeviceAbsent("host", "away"))
        self.listeners.publish(DeviceBack("host"))
        return said

    def say(self) -> object:
        """What can be seen of the books."""
        store, memory = self.store, self.store.memories["host"]
        return (
            [(c.key, c.total_bytes) for c in store.checkpoints.values()], sorted(store.lost), len(sealed_blobs(store)),
            [(lease.number, lease.checkpoint) for lease in store.leases], memory.used, store.live_bytes("host"),
            store.in_flight_bytes("host"),
        )  # fmt: skip

    def _is_locked(self, lease: Lease) -> bool:
        return lease.number in self.locked


@pytest.mark.parametrize("kind", EVENTS)
def test_a_listener_that_fails_changes_nothing_for_the_books_and_the_others(
    kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = Ear()
    expected = Books(quiet).everything_happens()
    assert {*quiet.heard} == {event.__name__ for event in EVENTS}, "each kind of event happens here"
    before, broken, after = Ear(), Ear(fatal=kind), Ear()
    assert Books(before, broken, after).everything_happens() == expected
    assert before.heard == after.heard == quiet.heard
    assert broken.cut
    assert broken.heard == quiet.heard[: quiet.heard.index(kind.__name__)]
    (record,) = [record for record in caplog.records if "hears nothing more" in record.message]
    assert record.message.startswith(f"Ear failed at {kind.__name__}")
    assert record.exc_info is not None


def test_who_reads_events_hears_that_no_more_come() -> None:
    def fail(_: object) -> Any:
        raise ValueError("not to be encoded")

    async def read() -> None:
        books = Books()
        event_stream = MonitoringEventStream(store=books.store, catalog=books.catalog, now=lambda: 0.0)
        books.listeners.add(event_stream)
        with event_stream.reader(WHO) as follower, event_stream.reader(WHO) as waiting:
            books.load("a")
            wait = asyncio.ensure_future(_drained(waiting.next))
            await asyncio.sleep(0)
            event_stream.encode = fail  # type: ignore[method-assign]  # exchanged
            books.load("b")
            kinds = await _drained(follower.next)
            assert len(kinds) == 4, "what came before is still read"
            assert await wait == kinds
        with pytest.raises(ServerError, match="no longer recorded"), event_stream.reader(WHO):
            pass

    asyncio.run(read())


async def _drained(following: Callable[[float], Any]) -> list[int]:
    """The kinds of the events that come until none come any more."""
    kinds: list[int] = []
    try:
        while event := await following(60.0):
            kinds.append(event.kind)
    except ServerError:
        return kinds
    raise AssertionError("it waits for what does not come")
