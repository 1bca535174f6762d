"""Times, users and leases, as the services show them."""

from __future__ import annotations

import pwd
from collections.abc import Hashable, Iterable
from datetime import UTC, datetime
from functools import cache

from google.protobuf.timestamp_pb2 import Timestamp

from weightd._proto.v1 import lease_pb2
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint
from weightd_daemon.core.lease import Lease


def time_to(seconds: float) -> Timestamp:
    """Seconds since the epoch as a Timestamp."""
    stamp = Timestamp()
    stamp.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return stamp


@cache
def user_name(uid: int | None) -> str:
    """A user's name, or its number as text; "?" without an identity.

    Each is looked up once: every attach tells of its user, and a directory service may be slow.
    """
    if uid is None:
        return "?"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def leases_to(leases: Iterable[Lease], checkpoints: Iterable[Checkpoint], catalog: Catalog) -> list[lease_pb2.Lease]:
    """Leases as messages, without those that are on none of these checkpoints."""
    there: dict[Hashable, Checkpoint] = {checkpoint.key: checkpoint for checkpoint in checkpoints}
    return [
        lease_pb2.Lease(
            lease=lease.number,
            pid=lease.holder.pid,
            uid=lease.holder.uid,
            user=user_name(lease.holder.uid),
            command=lease.holder.command,
            checkpoint=(catalog.names(checkpoint) or [checkpoint.key.content_digest])[0],
            device=checkpoint.key.device,
            bytes=checkpoint.total_bytes,
            since_time=time_to(lease.since),
            waiting=lease.waiting,
        )
        for lease in leases
        if (checkpoint := there.get(lease.checkpoint))
    ]
