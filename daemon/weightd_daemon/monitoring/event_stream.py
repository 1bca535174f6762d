"""The most recent events and their readers: a bounded history, and a bounded queue for each reader."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from weightd._proto.v1 import daemon_pb2
from weightd.errors import EventsLostError, InUseError, ServerError
from weightd_daemon.core.checkpoint import CheckpointKey
from weightd_daemon.core.events import (
    CatalogNameChanged,
    CheckpointEvicted,
    CheckpointSealed,
    DeviceAbsent,
    DeviceBack,
    DeviceLost,
    DrainChanged,
    Event,
    LoadAnswered,
    LoadBegun,
    LoadEnded,
)
from weightd_daemon.core.lease import LeaseBegun, LeaseEnded
from weightd_daemon.core.rate import UserRateLimit
from weightd_daemon.wire import time_to, user_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.lease import Lease, LeasePeer
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.core.store import ContentStore

REMEMBERED = 1024
"""Events that are kept for who asks later."""
BACKLOG = 1024
"""Events that may wait for one reader. With one more it has lost them all."""
MOST_READERS = 64
BURST, PER_SECOND = 1280, 2000.0
"""Events that go to all readers of one user together: at once, and in the long run. Each is a message, and a step."""
MOST_NAMES = 8
"""Names of a checkpoint in an event."""
MESSAGE_CHARACTERS = 2000
_CUT_OFF = "events are no longer recorded, because one could not be; the daemon's log says why, a restart mends it"


class _StreamedEvent(NamedTuple):
    """An event as it goes out, and the sharing domain that may see it; None: everybody."""

    domain: str | None
    message: daemon_pb2.Event

    def is_for(self, who: Principal) -> bool:
        """Whether `who` may see it: as with lists of checkpoints, those of its domain; an admin sees all."""
        return who.admin or self.domain in (None, who.domain)


class MonitoringEventReader:
    """One subscriber to the event stream. `recent` are the events remembered when it subscribed."""

    def __init__(self, who: Principal, remembered: Iterable[_StreamedEvent], rate: UserRateLimit) -> None:
        self.recent = [streamed.message for streamed in remembered if streamed.is_for(who)]
        self._who = who
        self._rate = rate
        self._queue: deque[daemon_pb2.Event] = deque()
        self._lost = 0
        self._over = False
        self._there = asyncio.Event()

    def put(self, streamed: _StreamedEvent) -> None:
        """Let it have an event. One that is too far behind loses what waits, and all that comes, until it looks."""
        if not streamed.is_for(self._who):
            return
        if self._lost or len(self._queue) >= BACKLOG:
            self._lost += len(self._queue) + 1
            self._queue.clear()
        else:
            self._queue.append(streamed.message)
        self._there.set()

    async def turn(self) -> None:
        """Wait until one more event may go to this reader's user."""
        if delay := self._rate.delay(self._who.uid):
            await asyncio.sleep(delay)

    def end(self) -> None:
        """No more events come."""
        self._over = True
        self._there.set()

    async def next(self, seconds: float) -> daemon_pb2.Event | None:
        """The next event, or None where none comes in time. Errors: EventsLostError, ServerError (cut off)."""
        if not self._queue and not self._lost and not self._over:
            self._there.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._there.wait()
            except TimeoutError:
                return None
        if self._lost:
            raise EventsLostError(
                f"{self._lost} events are lost: this reader is too slow; follow again, and read faster"
            )
        if not self._queue:
            raise ServerError(_CUT_OFF)
        event = self._queue.popleft()
        await self.turn()
        return event


class MonitoringEventStream:
    """Keeps the most recent events and streams new ones to those who watch."""

    def __init__(self, *, store: ContentStore, catalog: Catalog, now: Callable[[], float]) -> None:
        self._store = store
        self._catalog = catalog
        self._now = now
        self._remembered: deque[_StreamedEvent] = deque(maxlen=REMEMBERED)
        self._readers: set[MonitoringEventReader] = set()
        self._rate = UserRateLimit(time.monotonic, burst=BURST, per_second=PER_SECOND)
        self._cut_off = False

    def on_event(self, event: Event) -> None:
        """Something has happened."""
        domain, message = self.encode(event)
        message.event_time.CopyFrom(time_to(self._now()))
        streamed = _StreamedEvent(domain, message)
        self._remembered.append(streamed)
        for reader in self._readers:
            reader.put(streamed)

    def cut_off(self) -> None:
        """It hears nothing more."""
        self._cut_off = True
        for reader in self._readers:
            reader.end()

    @contextmanager
    def reader(self, who: Principal) -> Iterator[MonitoringEventReader]:
        """Read what `who` may see. Errors: InUseError (too many read), ServerError (events are no longer recorded)."""
        if self._cut_off:
            raise ServerError(_CUT_OFF)
        if len(self._readers) >= MOST_READERS:
            raise InUseError(f"{MOST_READERS} readers of events are there already; end one of them")
        reader = MonitoringEventReader(who, self._remembered, self._rate)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def encode(self, event: Event) -> tuple[str | None, daemon_pb2.Event]:
        """The sharing domain that may see an event, None for everybody, and the message of it, without a time."""
        match event:
            case CheckpointSealed(checkpoint, load=load, by=by, name=name):
                message = self._of(daemon_pb2.EVENT_KIND_SEALED, checkpoint, name)
                message.load = load
                _name(message, by)
                return checkpoint.key.domain, message
            case CheckpointEvicted(checkpoint, reason, load, by):
                message = self._of(daemon_pb2.EVENT_KIND_EVICTED, checkpoint)
                message.reason = reason
                message.load = load
                _name(message, by)
                return checkpoint.key.domain, message
            case LoadAnswered(checkpoint, peer, name):
                message = self._of(daemon_pb2.EVENT_KIND_LOAD_ANSWERED, checkpoint, name)
                _name(message, peer)
                return checkpoint.key.domain, message
            case CatalogNameChanged(domain, name, content_digest, previous, by):
                given = daemon_pb2.Event(
                    kind=daemon_pb2.EVENT_KIND_NAMED, content_digest=content_digest, previous_digest=previous
                )
                dropped = daemon_pb2.Event(kind=daemon_pb2.EVENT_KIND_UNNAMED, content_digest=previous)
                message = given if content_digest else dropped
                message.names.append(name)
                _name(message, by)
                return domain, message
            case LeaseBegun(lease):
                return self._of_lease(daemon_pb2.EVENT_KIND_ATTACHED, lease)
            case LeaseEnded(lease):
                return self._of_lease(daemon_pb2.EVENT_KIND_DETACHED, lease)
            case LoadBegun():
                return event.domain, _of_load(daemon_pb2.EVENT_KIND_LOAD_BEGUN, event)
            case LoadEnded(begun):
                message = _of_load(daemon_pb2.EVENT_KIND_LOAD_ENDED, begun)
                message.reason = event.reason
                message.message = event.message[:MESSAGE_CHARACTERS]
                message.seconds = event.seconds
                message.content_digest = event.content_digest
                message.total_bytes = event.total_bytes
                message.unique_bytes = event.unique_bytes
                message.read_bytes = event.read_bytes
                message.evicted.extend(event.evicted)
                message.evicted_others = event.evicted_others
                return begun.domain, message
            case DeviceLost(device, reason):
                kind = daemon_pb2.EVENT_KIND_DEVICE_LOST
                return None, daemon_pb2.Event(kind=kind, device=device, message=reason[:MESSAGE_CHARACTERS])
            case DeviceAbsent(device, reason):
                kind = daemon_pb2.EVENT_KIND_DEVICE_ABSENT
                return None, daemon_pb2.Event(kind=kind, device=device, message=reason[:MESSAGE_CHARACTERS])
            case DeviceBack(device):
                return None, daemon_pb2.Event(kind=daemon_pb2.EVENT_KIND_DEVICE_BACK, device=device)
            case DrainChanged(state):
                return None, daemon_pb2.Event(kind=f"EVENT_KIND_{state.upper()}")

    def _of(self, kind: daemon_pb2.EventKind, checkpoint: Checkpoint, name: str = "") -> daemon_pb2.Event:
        """An event of a checkpoint; `name` is what it is to be called, too, and comes first."""
        names = list(dict.fromkeys(filter(None, (name, *self._catalog.names(checkpoint, MOST_NAMES)))))
        return daemon_pb2.Event(
            kind=kind,
            content_digest=checkpoint.key.content_digest,
            device=checkpoint.key.device,
            names=names[:MOST_NAMES],
            total_bytes=checkpoint.total_bytes,
        )

    def _of_lease(self, kind: daemon_pb2.EventKind, lease: Lease) -> tuple[str, daemon_pb2.Event]:
        key = lease.checkpoint
        assert isinstance(key, CheckpointKey)  # in the daemon they are
        lost = self._store.lost.get(key)
        checkpoint = lost.checkpoint if lost else self._store.checkpoints[key]
        message = self._of(kind, checkpoint)
        message.lease = lease.number
        _name(message, lease.peer)
        return key.domain, message


def _of_load(kind: daemon_pb2.EventKind, begun: LoadBegun) -> daemon_pb2.Event:
    names = [begun.name] if begun.name else []
    message = daemon_pb2.Event(kind=kind, load=begun.load, device=begun.device, names=names)
    _name(message, begun.peer)
    return message


def _name(message: daemon_pb2.Event, peer: LeasePeer | None) -> None:
    """Say which process it was, where it was one."""
    if peer is None:
        return
    who = daemon_pb2.Event(pid=peer.pid, uid=peer.uid, user=user_name(peer.uid), command=peer.command)
    message.MergeFrom(who)
