"""Attach: finds the checkpoint, selects the segments, takes the lease."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightd import _failpoints
from weightd._transport.convert import source_from
from weightd.errors import DeviceError, InvalidReferenceError, NotFoundError
from weightd_daemon.core.catalog import CONTROL, NAME_BYTES
from weightd_daemon.core.checkpoint import CheckpointKey
from weightd_daemon.core.lease import NOBODY
from weightd_daemon.devices.naming import meant, place
from weightd_daemon.loads.request import LoadRequest

from .lease_files import HandleLeaseOwner

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from weightd._proto.v1 import checkpoint_pb2, composition_pb2, handles_pb2
    from weightd.types import SourceFile
    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.limits import UserLimits
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device, Handle
    from weightd_daemon.loads.loads import Loads

    from .connections import HandleSocketConnection, HandleSocketConnections
    from .lease_locks import HandleLeaseLocks, LockedHandles
    from .manifests import ManifestHandles


MOST_ENDED = 256
"""Leases that one frame may say have ended."""

MAX_SOURCES = 10_000
"""Most files of one checkpoint."""


def sources_from(messages: Sequence[checkpoint_pb2.SourceFile]) -> tuple[SourceFile, ...]:
    """The files that a request names, the indexes after all others.

    Errors: InvalidReferenceError (too many, a bad name, one named twice, an index in the wrong place).
    """
    check_files(messages)
    _check_indexes(messages)
    return tuple(map(source_from, messages))


def check_files(messages: Sequence[checkpoint_pb2.SourceFile] | Sequence[composition_pb2.ComposedFile]) -> None:
    """Whether a checkpoint may have these files. Errors: InvalidReferenceError (too many, a bad name, one twice)."""
    if len(messages) > MAX_SOURCES:
        raise InvalidReferenceError(f"the request names {len(messages)} files; a checkpoint may have {MAX_SOURCES}")
    seen: set[tuple[str, str]] = set()
    for message in messages:
        for what, text, least in (("component", message.component, 0), ("file", message.file, 1)):
            if not least <= len(text.encode()) <= NAME_BYTES or CONTROL.search(text):
                raise InvalidReferenceError(
                    f"{what} name {text[:80]!r}: must have {least} to {NAME_BYTES} bytes and no control characters"
                )
        key = (message.component, message.file)
        if key in seen:
            raise InvalidReferenceError(f"file {'/'.join(filter(None, key))!r} is named twice; name each file once")
        seen.add(key)


def shown(reference: str) -> str:
    """What files were found by, where it can be shown; else nothing, for it names nothing."""
    return "" if CONTROL.search(reference) or len(reference.encode()) > NAME_BYTES else reference


def _check_indexes(messages: Sequence[checkpoint_pb2.SourceFile]) -> None:
    places = [message.is_index for message in messages]
    indexed = [message.component for message in messages if message.is_index]
    if places != sorted(places):
        raise InvalidReferenceError("a file comes after an index; name the indexes after all other files")
    if len(set(indexed)) < len(indexed):
        raise InvalidReferenceError("a component has two indexes; name the one that counts")
    if lost := set(indexed) - {message.component for message in messages if not message.is_index}:
        raise InvalidReferenceError(f"component {min(lost)[:80]!r} has an index and no other file; name its files, too")


@dataclass(frozen=True, slots=True)
class IssuedHandles:
    """Answer to an attach request: the handles that go to the client.

    The descriptors of `locked` are to be closed when they have been sent. Then leases that waited for it end: `waited`.
    """

    lease: int
    waited: list[int]
    checkpoint: Checkpoint
    locked: LockedHandles
    manifest_bytes: int
    segments: list[int]
    handles: list[Handle]


class AttachHandler:
    """Handles attach requests of the handle socket: takes leases and issues descriptors of manifests and segments."""

    def __init__(
        self,
        *,
        store: ContentStore,
        catalog: Catalog,
        loads: Loads,
        manifests: ManifestHandles,
        locks: HandleLeaseLocks,
        connections: HandleSocketConnections,
        devices: dict[str, Device],
        default_device: str,
        limits: UserLimits,
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._loads = loads
        self._manifests = manifests
        self._locks = locks
        self._connections = connections
        self._devices = devices
        self._default_device = default_device
        self._limits = limits
        self._now = now

    def room(self, connection: HandleSocketConnection, request: handles_pb2.AttachRequest) -> Awaitable[None] | None:
        """What has to be awaited before `attach`, if anything: its lease must outlive this daemon.

        Errors: PermissionDeniedError, OSError.
        """
        who = self._connections.who(connection)
        return self._locks.room(HandleLeaseOwner(who.uid, who.domain)) if request.lease_file else None

    def attach(self, connection: HandleSocketConnection, request: handles_pb2.AttachRequest) -> IssuedHandles:
        """Take a lease and say what to send; when it was sent, `issued` is due.

        Errors: NotFoundError, InvalidReferenceError, PermissionDeniedError, CapacityError (a limit of the user),
        DeviceAbsentError (its manifest can be had all the same, unless the device is being let go of).
        """
        who = self._connections.who(connection)
        checkpoint = self._find(connection, who, request)
        if not request.manifest_only or checkpoint.key.device in self._store.leaving:
            self._store.check_present(checkpoint.key.device, f"checkpoint {self._called(checkpoint)}")
        waiting = [
            lease.number
            for lease in self._store.leases.waiting_of(connection.number)
            if lease.checkpoint == checkpoint.key
        ]
        if most := self._limits.most(who, "leases"):
            held = self._store.leases.held_by(who.uid, most)
            self._limits.check(who, "leases", held - len(waiting))  # which end with this
        segments = self._segments(checkpoint, request)
        now = self._now()
        lease = self._store.leases.begin(checkpoint.key, connection.peer, now, told=False)
        owner = HandleLeaseOwner(who.uid, who.domain) if request.lease_file else None
        try:
            _failpoints.reach("attach.lock")
            locked = self._locks.lock(checkpoint.key, lease.number, owner)
        except OSError:
            self._store.leases.end(lease.number)
            raise
        if request.manifest_only:  # looking changes nothing: neither the order of eviction nor what waits
            waiting = []
        else:
            self._store.use(checkpoint, now)
        device = self._devices[checkpoint.key.device]
        everything = checkpoint.segments
        return IssuedHandles(
            lease.number,
            waiting,
            checkpoint,
            locked,
            self._manifests.size(checkpoint.key),
            segments,
            [device.shared(everything[index]) for index in segments],
        )

    def issued(self, answer: IssuedHandles) -> None:
        """The client has been sent what `attach` returned: now others are told of it, which takes as long again.

        Nor does anything wait for it any more. Had this not gone out, what waits would keep the checkpoint until it
        tries again.
        """
        self._store.leases.tell(answer.lease)
        for number in answer.waited:
            self._store.leases.end(number)

    def detach(self, connection: HandleSocketConnection, number: int) -> bool:
        """Look whether a lease of this connection has ended."""
        lease = self._store.leases.get(number)
        if lease is None:
            return True
        if lease.peer.connection != connection.number:
            return False
        return not self._store.leases.look(number)

    def reclaim(self, connection: HandleSocketConnection, request: handles_pb2.ReclaimRequest) -> bool:
        """Enter the connection as who holds a lease, if it is held, and by nobody known or by the same user.

        This makes no lease and ends none. So all that a client can gain by a false claim is a line in `weightd ps`.
        """
        who, lease = self._connections.who(connection), self._store.leases.get(request.lease)
        if lease is None or lease.waiting:
            return False
        key, claimed = lease.checkpoint, (request.device, request.content_digest)
        if not isinstance(key, CheckpointKey) or (key.device, key.content_digest) != claimed:
            return False
        known = lease.peer != NOBODY
        if (key.domain != who.domain and not who.admin) or (known and lease.peer.uid != connection.uid):
            return False
        if not self._store.leases.look(lease.number):
            return False
        self._store.leases.attribute(lease.number, connection.peer)
        return True

    def ended(self, connection: HandleSocketConnection, numbers: Sequence[int]) -> None:
        """The client says that leases of this connection may have ended."""
        if not numbers:
            return
        leases = self._store.leases
        named = (leases.get(number) for number in numbers[:MOST_ENDED])
        leases.look_soon(one.number for one in named if one and one.peer.connection == connection.number)

    def disconnected(self, connection: HandleSocketConnection) -> None:
        """A connection is gone: what waited for it is let go, what it mapped is looked at, now or soon."""
        leases = self._store.leases
        self._loads.disconnected(connection.number)
        for lease in leases.waiting_of(connection.number):
            leases.end(lease.number)
        leases.look_soon(lease.number for lease in leases.of_connection(connection.number))

    def check_offer(self, connection: HandleSocketConnection) -> None:
        """Whether a connection's user may have one more intake open. Errors: CapacityError, PermissionDeniedError."""
        who = self._connections.who(connection)
        self._limits.check(who, "offers", self._connections.offers_of(who.uid) + self._loads.untaken(who.uid))

    def _find(
        self, connection: HandleSocketConnection, who: Principal, request: handles_pb2.AttachRequest
    ) -> Checkpoint:
        target = request.WhichOneof("target")
        if target == "reference":
            return self._named(who, request.reference, meant(self._devices, request.device))
        if target == "sources":
            return self._of_files(connection, who, request)
        raise InvalidReferenceError("the attach request names neither a reference nor files")

    def _of_files(
        self, connection: HandleSocketConnection, who: Principal, request: handles_pb2.AttachRequest
    ) -> Checkpoint:
        """The checkpoint of these files: where a load of them would go; who only wants to know, wherever it is."""
        anywhere = request.manifest_only and not request.device
        devices = self._devices if anywhere else [place(self._devices, self._default_device, request.device)]
        sources = sources_from(request.sources.sources)
        resident = {
            device: checkpoint
            for device in devices
            if (checkpoint := self._loads.find_resident(LoadRequest(who, connection.peer, sources, device)))
        }
        if self._default_device in resident:
            return resident[self._default_device]
        if not resident:
            raise NotFoundError("no resident checkpoint was loaded from exactly these files", {"missing": "sources"})
        if len(resident) > 1:
            raise InvalidReferenceError(f"these files are resident on {', '.join(resident)}; say which with --device")
        return next(iter(resident.values()))

    def _named(self, who: Principal, reference: str, device: str) -> Checkpoint:
        """The checkpoint of a name or digest; where it is on several devices and none was said, the default one's."""
        if not device and self._default_device:
            try:
                return self._catalog.find(who, reference, self._default_device)
            except (NotFoundError, DeviceError):
                pass
        return self._catalog.find(who, reference, device)

    def _called(self, checkpoint: Checkpoint) -> str:
        return self._catalog.name(checkpoint) or checkpoint.key.content_digest[:19]

    def _segments(self, checkpoint: Checkpoint, request: handles_pb2.AttachRequest) -> list[int]:
        """Indices into the manifest's segments that the request needs. Errors: NotFoundError."""
        if request.manifest_only:
            return []
        if not request.components and not request.tensors:
            return list(range(len(checkpoint.segments)))
        keys = {(key.component, key.name) for key in request.tensors}
        return self._manifests.table(checkpoint.key).find(request.components, keys)
