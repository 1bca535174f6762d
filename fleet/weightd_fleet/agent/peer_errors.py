"""Errors between agents: a reason in a call's trailing metadata, and a message that may come from a hostile peer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from weightd.errors import DaemonBusyError, DaemonUnreachableError, PermissionDeniedError, WeightdError, from_wire

from .addresses import AgentAddress, parse_address

if TYPE_CHECKING:
    from collections.abc import Iterable

REASON: Final = "weightd-reason"
SOURCES: Final = "weightd-sources"
MAX_SOURCES: Final = 64
_MAX_MESSAGE: Final = 1000
_NOT_REACHED: Final = re.compile(r"^failed to connect to all addresses; last error: (?:\w+: )?(?:ipv[46]:\S+: )?")
"""How gRPC begins to say that nobody answers; what follows is the cause."""
_OF_READS: Final = {"NOT_FOUND", "BUSY", "DRAINING", "PERMISSION_DENIED", "INVALID_REFERENCE", "FORMAT"}
"""What a peer may say of a read. It may not pose as an error of this node, such as a full device."""


class PeerBusyError(DaemonBusyError):
    """A peer that serves as many readers as it may. `sources` are agents that have fetched the checkpoint from it."""

    def __init__(self, message: str, sources: Iterable[AgentAddress] = ()) -> None:
        super().__init__(message)
        self.sources = tuple(sources)


def trailers_of(error: WeightdError) -> tuple[tuple[str, str], ...]:
    """What is sent with an error, beside its message."""
    sources = ",".join(map(str, error.sources)) if isinstance(error, PeerBusyError) else ""
    return ((REASON, error.reason), *([(SOURCES, sources)] if sources else []))


def error_from(
    peer: AgentAddress, code: str, message: str, trailers: Iterable[tuple[str, str | bytes]], *, of_read: bool
) -> WeightdError:
    """The error that a peer's answer stands for; `code` is gRPC's. Whatever is not well formed is left out."""
    said = {key: value for key, value in trailers if isinstance(value, str)}
    message = _NOT_REACHED.sub("cannot be reached: ", message[:_MAX_MESSAGE])
    text = f"peer {peer}: {message.encode('unicode_escape').decode()}"
    if said.get(REASON) == PeerBusyError.reason:
        sources: list[AgentAddress] = []
        for one in said.get(SOURCES, "").split(",")[:MAX_SOURCES]:
            try:
                sources.append(parse_address(one))
            except WeightdError:
                continue
        return PeerBusyError(text, sources)
    if said.get(REASON) in _OF_READS or (REASON in said and not of_read):
        return from_wire(said[REASON], text)
    if code == "PERMISSION_DENIED":
        return PermissionDeniedError(text)
    if code == "DEADLINE_EXCEEDED":
        return DaemonUnreachableError(f"peer {peer}: sends nothing, or too slowly; try another one")
    return DaemonUnreachableError(text)
