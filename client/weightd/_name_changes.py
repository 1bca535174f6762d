"""Follow a name: what it means at first, and each change of that, beyond the life of one daemon."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ._transport.unreachable import when_reachable
from .errors import DaemonUnreachableError, EventsLostError, LeaseLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._transport.rpc import RpcClient
    from .types import NameInfo

_AGAIN_SECONDS = 0.2
_PASSING = (DaemonUnreachableError, EventsLostError, LeaseLostError)
"""What ends a stream of events and not the watch: the daemon restarts, or the events were read too slowly."""


def name_changes(connected: Callable[[], RpcClient], name: str) -> Iterator[NameInfo | None]:
    """What a name means, at once if there is such a name; then its changes, and None when it goes, without end.

    `connected` returns the gRPC client, connected anew where the daemon has gone. Errors: its, at first.
    """
    return _changes(connected(), connected, name)


def _changes(rpc: RpcClient, connected: Callable[[], RpcClient], name: str) -> Iterator[NameInfo | None]:
    seen: tuple[str, str] | None = None
    while True:
        with contextlib.suppress(*_PASSING), contextlib.closing(rpc.name_changes(name)) as changes:
            for now in changes:
                means = None if now is None else (now.content_digest, now.state)
                if means != seen:
                    seen = means
                    yield now
        time.sleep(_AGAIN_SECONDS)
        rpc = when_reachable(connected, wait=True)
