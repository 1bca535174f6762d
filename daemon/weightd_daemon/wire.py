"""Encodes times, users and leases for the services."""

from __future__ import annotations

import asyncio
import pwd
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

from google.protobuf.timestamp_pb2 import Timestamp

from .lookups import Lookups

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

    from weightd._proto.v1 import lease_pb2

    from .core.catalog import Catalog
    from .core.checkpoint import Checkpoint
    from .core.lease import Lease

MOST_NAMES = 4096
_NAME_THREADS = 2
_LEASES_IN_A_STEP = 256

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


class UserNames:
    """Names of users, as far as they are known: a name service may take for ever to answer, so a thread asks it.

    `look_up` returns the name of a uid. Errors: KeyError, OSError (it has none that anybody knows).
    """

    def __init__(self, look_up: Callable[[int], str] = lambda uid: pwd.getpwuid(uid).pw_name) -> None:
        self._look_up = look_up
        self._known: dict[int, str] = {}
        self._asked: set[int] = set()
        self._lookups = Lookups("names", _NAME_THREADS)

    def of(self, uid: int | None) -> str:
        """A user's name, or its number as text, also until the name is known; "?" without an identity."""
        if uid is None:
            return "?"
        name = self._known.get(uid)
        if name is None and uid not in self._asked:
            self._asked.add(uid)
            if not self._lookups.ask(uid, partial(self._find, uid)):
                self._asked.discard(uid)
        return str(uid) if name is None else name

    def _find(self, uid: int) -> None:
        """Runs on a thread; single steps on dicts and sets need no lock."""
        try:
            name = self._look_up(uid)
        except (KeyError, OSError):
            name = str(uid)
        self._known[uid] = name
        self._asked.discard(uid)
        while len(self._known) > MOST_NAMES:
            self._known.pop(next(iter(self._known)), None)


user_name = UserNames().of


async def add_leases(
    to: RepeatedCompositeFieldContainer[lease_pb2.Lease],
    leases: Iterable[Lease],
    checkpoints: Iterable[Checkpoint],
    catalog: Catalog,
) -> None:
    """Add leases to a message, but those that are on none of these checkpoints. Every now and then the loop goes on."""
    there: dict[Hashable, tuple[Checkpoint, str]] = {
        checkpoint.key: (checkpoint, catalog.name(checkpoint) or checkpoint.key.content_digest)
        for checkpoint in checkpoints
    }
    for number, lease in enumerate(leases, 1):
        if lease.checkpoint in there:
            checkpoint, called = there[lease.checkpoint]
            to.add(
                lease=lease.number,
                pid=lease.peer.pid,
                uid=lease.peer.uid,
                user=user_name(lease.peer.uid),
                command=lease.peer.command,
                checkpoint=called,
                device=checkpoint.key.device,
                bytes=checkpoint.total_bytes,
                since_time=time_to(lease.since),
                waiting=lease.waiting,
            )
        if number % _LEASES_IN_A_STEP == 0:
            await asyncio.sleep(0)
