"""The log lines of checkpoint events: what happened to which checkpoint, and who caused it.

People read the words; the figures follow as `key=value`. In JSON a line also has the keys `names`, `user`, `uid`, `pid`
and `evicted`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from weightd._proto.v1 import daemon_pb2
from weightd_daemon.log_line import Fields, Line

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightd_daemon.core.events import Event

log = logging.getLogger(__name__)

_SHORT = 19
"""Characters of a digest in a line: "sha256:" and 12 digits."""


class EventLog:
    """Writes every event to the log. `encode` makes the message of an event."""

    def __init__(self, encode: Callable[[Event], tuple[str | None, daemon_pb2.Event]]) -> None:
        self._encode = encode

    def on_event(self, event: Event) -> None:
        """Something has happened. Never raises: unlike a stream of events, a log shows where a line is missing."""
        try:
            write(self._encode(event)[1])
        except Exception:  # whatever it is, the lines of later events do not hang on it
            log.exception("no line for %s, by a bug", type(event).__name__)

    def cut_off(self) -> None:
        """Nobody asks it anything."""


def write(event: daemon_pb2.Event) -> None:
    """Log an event; one that has a line elsewhere, or that another implies, has none here."""
    kinds, content = daemon_pb2.EventKind, event.content_digest[:_SHORT]
    what = ", ".join(event.names) or content or "files without a name"
    pid, uid = (getattr(event, key) if event.HasField(key) else None for key in ("pid", "uid"))
    by = f" by {event.user} (pid {'unknown' if pid is None else pid})" if event.user else ""
    others = f"{event.evicted_others} of other users" if event.evicted_others else ""
    evicted = ", ".join(filter(None, (*(_short(name) for name in event.evicted), others)))
    evicted = f", evicted {evicted}" if evicted else ""
    more: dict[str, object] = {"names": list(event.names)}
    if event.user:
        more |= {"user": event.user, "uid": uid, "pid": pid}
    if event.kind == kinds.EVENT_KIND_LOAD_ENDED:
        more["evicted"] = list(event.evicted)
    where = {"content": content, "device": event.device}

    def line(*parts: str | Fields, because: str | None = None) -> Line:
        return Line(*parts, because=because, more=more)

    match event.kind:
        case kinds.EVENT_KIND_LOAD_ENDED if event.reason == "OK":
            figures = {key: getattr(event, key) for key in ("total_bytes", "unique_bytes", "read_bytes", "seconds")}
            log.info(line(f"loaded {what}{by}{evicted}", where, figures))
        case kinds.EVENT_KIND_LOAD_ENDED if event.reason == "CANCELLED":
            took = {"device": event.device, "seconds": event.seconds}
            log.info(line(f"load of {what}{by} cancelled{evicted}", took))
        case kinds.EVENT_KIND_LOAD_ENDED:
            failed = {"reason": event.reason, "device": event.device}
            log.warning(line(f"load of {what}{by} failed{evicted}", failed, because=event.message))
        case kinds.EVENT_KIND_LOAD_ANSWERED:
            log.info(line(f"loaded {what}{by} from memory", where, {"total_bytes": event.total_bytes}))
        case kinds.EVENT_KIND_EVICTED:
            cause = f" for load {event.load}" if event.load else ""
            log.info(line(f"evicted {what}{cause}{by}", where, {"reason": event.reason}))
        case kinds.EVENT_KIND_NAMED if event.previous_digest:
            moved = {"content": content, "previous": event.previous_digest[:_SHORT]}
            log.info(line(f"moved name {what}{by}", moved))
        case kinds.EVENT_KIND_NAMED:
            log.info(line(f"gave name {what}{by}", {"content": content}))
        case kinds.EVENT_KIND_UNNAMED:
            log.info(line(f"dropped name {what}{by}", {"content": content}))
        case kinds.EVENT_KIND_ATTACHED:
            log.info(line(f"attached {what}{by}", {"lease": event.lease}, where))


def _short(called: str) -> str:
    """A name, or a digest as others in the log."""
    return called[:_SHORT] if called.startswith("sha256:") else called
