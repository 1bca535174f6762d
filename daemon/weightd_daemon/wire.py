"""Times, users and leases, as the services show them."""

from __future__ import annotations

import pwd
from collections.abc import Hashable, Iterable
from datetime import UTC, datetime
from functools import cache
from urllib.parse import quote

from google.protobuf.timestamp_pb2 import Timestamp

from weightd._proto.v1 import lease_pb2

from .core.catalog import Catalog
from .core.checkpoint import Checkpoint
from .core.lease import Lease

_MESSAGE_BYTES = 6000


def clip(message: str) -> str:
    """An error's text as it can be sent: a reference in it may be as long as a request.

    gRPC takes about 8 KiB of trailers, where the text stands percent-encoded and once more in base64. The end stays,
    for it says what to do.
    """
    kept = message
    length = len(message)
    while len(quote(kept)) + len(kept.encode("utf-8", "replace")) * 4 // 3 > _MESSAGE_BYTES:
        length = min(length, 4000) * 3 // 4
        kept = f"{message[: length * 2 // 3]} […] {message[-(length // 3) :]}"
    return kept


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
