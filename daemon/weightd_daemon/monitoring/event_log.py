"""The log lines of what happens to checkpoints: what became of which, and who did it.

People read the words; the figures follow as `key=value`. In JSON a line also has the keys `names`, `user`, `uid`, `pid`
and `evicted`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from weightd._proto.v1 import daemon_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightd_daemon.core.events import Event

log = logging.getLogger(__name__)

_SHORT = 19
"""Characters of a digest in a line: "sha256:" and 12 digits."""


class EventLog:
    """Listens to everything, and logs it. `encode` makes the message of an event."""

    def __init__(self, encode: Callable[[Event], tuple[str | None, daemon_pb2.Event]]) -> None:
        self._encode = encode

    def tell(self, event: Event) -> None:
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
    fields: dict[str, object] = {"names": list(event.names)}
    if event.user:
        fields |= {"user": event.user, "uid": uid, "pid": pid}
    if event.kind == kinds.EVENT_KIND_LOAD_ENDED:
        fields["evicted"] = list(event.evicted)
    extra = {"fields": fields}
    match event.kind:
        case kinds.EVENT_KIND_LOAD_ENDED if event.reason == "OK":
            log.info(
                "loaded %s%s%s content=%s device=%s total_bytes=%d unique_bytes=%d read_bytes=%d seconds=%.3f",
                what, by, evicted, content, event.device, event.total_bytes, event.unique_bytes, event.read_bytes,
                event.seconds, extra=extra,
            )  # fmt: skip
        case kinds.EVENT_KIND_LOAD_ENDED if event.reason == "CANCELLED":
            log.info("load of %s%s cancelled%s device=%s seconds=%.3f",
                     what, by, evicted, event.device, event.seconds, extra=extra)  # fmt: skip
        case kinds.EVENT_KIND_LOAD_ENDED:
            log.warning("load of %s%s failed%s reason=%s device=%s: %s",
                        what, by, evicted, event.reason, event.device, event.message, extra=extra)  # fmt: skip
        case kinds.EVENT_KIND_LOAD_ANSWERED:
            log.info("loaded %s%s from memory content=%s device=%s total_bytes=%d",
                     what, by, content, event.device, event.total_bytes, extra=extra)  # fmt: skip
        case kinds.EVENT_KIND_EVICTED:
            cause = f" for load {event.load}" if event.load else ""
            log.info("evicted %s%s%s content=%s device=%s reason=%s",
                     what, cause, by, content, event.device, event.reason, extra=extra)  # fmt: skip
        case kinds.EVENT_KIND_NAMED if event.previous_digest:
            log.info("moved name %s%s content=%s previous=%s",
                     what, by, content, event.previous_digest[:_SHORT], extra=extra)  # fmt: skip
        case kinds.EVENT_KIND_NAMED:
            log.info("gave name %s%s content=%s", what, by, content, extra=extra)
        case kinds.EVENT_KIND_UNNAMED:
            log.info("dropped name %s%s content=%s", what, by, content, extra=extra)
        case kinds.EVENT_KIND_ATTACHED:
            log.info("attached %s%s lease=%d content=%s device=%s",
                     what, by, event.lease, content, event.device, extra=extra)  # fmt: skip


def _short(called: str) -> str:
    """A name, or a digest as others in the log."""
    return called[:_SHORT] if called.startswith("sha256:") else called
