"""Convert between the values of types.py and the messages of the wire. No grpc: the handle socket uses this, too."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from weightd._proto.v1 import checkpoint_pb2, daemon_pb2, lease_pb2
from weightd.errors import InvalidReferenceError
from weightd.types import (
    CheckpointInfo,
    DaemonEvent,
    FileIdentity,
    LeaseInfo,
    LoadProgress,
    LoadResult,
    NameInfo,
    SourceFile,
)

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_STATES = {
    checkpoint_pb2.CHECKPOINT_STATE_LOADING: "loading",
    checkpoint_pb2.CHECKPOINT_STATE_RESIDENT: "resident",
    checkpoint_pb2.CHECKPOINT_STATE_LOST: "lost",
    checkpoint_pb2.CHECKPOINT_STATE_EVICTED: "evicted",
    checkpoint_pb2.CHECKPOINT_STATE_ABSENT: "absent",
}


_PHASES = {
    checkpoint_pb2.LoadProgress.PHASE_OPENING: "opening",
    checkpoint_pb2.LoadProgress.PHASE_HASHING: "hashing",
    checkpoint_pb2.LoadProgress.PHASE_COPYING: "copying",
}

_ORDERS = {
    checkpoint_pb2.LOAD_ORDER_REQUESTED: "requested",
    checkpoint_pb2.LOAD_ORDER_JOINED: "joined",
    checkpoint_pb2.LOAD_ORDER_RESIDENT: "resident",
}

_EVENT = "EVENT_KIND_"


def check_name(name: str) -> None:
    """What the wire could not carry, or would take for no name at all. Errors: InvalidReferenceError."""
    try:
        empty = not name.encode()
    except UnicodeEncodeError:
        raise InvalidReferenceError(f"name {name!r}: is not valid Unicode") from None
    if empty:
        raise InvalidReferenceError("name '': must have at least one character; leave it out for the default")


def time_from(stamp: Timestamp) -> datetime:
    """A moment in UTC."""
    return stamp.ToDatetime(UTC)


def source_to(source: SourceFile) -> checkpoint_pb2.SourceFile:
    """A source file as a message."""
    seen = source.identity
    identity = checkpoint_pb2.FileIdentity(
        device=seen.device, inode=seen.inode, size_bytes=seen.size, mtime_ns=seen.mtime_ns, ctime_ns=seen.ctime_ns
    )
    return checkpoint_pb2.SourceFile(
        component=source.component, file=source.file, identity=identity, is_index=source.is_index
    )


def source_from(message: checkpoint_pb2.SourceFile) -> SourceFile:
    """A source file from a message."""
    seen = message.identity
    identity = FileIdentity(seen.device, seen.inode, seen.size_bytes, seen.mtime_ns, seen.ctime_ns)
    return SourceFile(message.component, message.file, identity, message.is_index)


def progress_from(message: checkpoint_pb2.LoadProgress) -> LoadProgress:
    """How a load gets on, from its message."""
    return LoadProgress(_PHASES.get(message.phase, "copying"), message.done_bytes, message.total_bytes)


def result_from(message: checkpoint_pb2.LoadResult) -> LoadResult:
    """What a load brought, from its message."""
    return LoadResult(
        name=message.name,
        content_digest=message.content_digest,
        tensors=message.tensors,
        total_bytes=message.total_bytes,
        unique_bytes=message.unique_bytes,
        shared_bytes=message.shared_bytes,
        read_bytes=message.read_bytes,
        seconds=message.seconds,
        device=message.device,
        evicted=tuple(message.evicted),
        evicted_others=message.evicted_others,
        order=_ORDERS.get(message.order, ""),
        groups=message.groups,
        ignored_groups=tuple(message.ignored_groups),
    )


def checkpoint_from(message: checkpoint_pb2.Checkpoint) -> CheckpointInfo:
    """A checkpoint from its message."""
    loaded = message.HasField("load_time")
    return CheckpointInfo(
        names=tuple(message.names),
        content_digest=message.content_digest,
        device=message.device,
        tensors=message.tensors,
        total_bytes=message.total_bytes,
        exclusive_bytes=message.exclusive_bytes,
        shared_bytes=message.shared_bytes,
        leases=message.leases,
        pinned=message.pinned,
        loaded_at=time_from(message.load_time) if loaded else None,
        last_used_at=time_from(message.last_use_time) if loaded else None,
        state=_STATES.get(message.state, "unknown"),
        owner_uid=message.owner_uid if message.HasField("owner_uid") else None,
        owner=message.owner,
    )


def name_from(message: checkpoint_pb2.Name) -> NameInfo:
    """A name from its message."""
    owner_uid = message.owner_uid if message.HasField("owner_uid") else None
    state = _STATES.get(message.state, "unknown")
    return NameInfo(message.name, message.content_digest, state, owner_uid, message.owner, message.is_default)


def _process(message: lease_pb2.Lease | daemon_pb2.Event) -> tuple[int | None, int | None]:
    """Process and user, each None where the daemon does not know it."""
    return message.pid if message.HasField("pid") else None, message.uid if message.HasField("uid") else None


def lease_from(message: lease_pb2.Lease) -> LeaseInfo:
    """A lease from its message."""
    return LeaseInfo(
        message.lease, *_process(message), message.user, message.command, message.checkpoint, message.device,
        message.bytes, time_from(message.since_time), message.waiting,
    )  # fmt: skip


def event_from(message: daemon_pb2.Event) -> DaemonEvent:
    """An event from its message; a kind that only a newer daemon knows is "unknown"."""
    pid, uid = _process(message)
    kinds = daemon_pb2.EventKind
    known = message.kind in kinds.values()
    return DaemonEvent(
        time=time_from(message.event_time),
        kind=kinds.Name(message.kind).removeprefix(_EVENT).lower() if known else "unknown",
        content_digest=message.content_digest,
        device=message.device,
        names=tuple(message.names),
        load=message.load,
        lease=message.lease,
        pid=pid,
        uid=uid,
        user=message.user,
        command=message.command,
        reason=message.reason,
        message=message.message,
        total_bytes=message.total_bytes,
        unique_bytes=message.unique_bytes,
        read_bytes=message.read_bytes,
        seconds=message.seconds,
        previous_digest=message.previous_digest,
        evicted=tuple(message.evicted),
        evicted_others=message.evicted_others,
    )
