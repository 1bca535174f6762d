"""Where a fetch reads from: peers in turn, of which one that is busy is waited for, and one that lies is dropped."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from weightd.errors import (
    DaemonBusyError,
    DaemonUnreachableError,
    DigestMismatchError,
    FormatError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolMismatchError,
    WeightdError,
)

from .peer_errors import MAX_SOURCES, PeerBusyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from weightd_fleet.core.manifest import FleetManifest

    from .addresses import AgentAddress
    from .peer import Peer
    from .staging import StagingFolder

_CALL_BYTES: Final = 256 << 20
"""Bytes of one call, if a row is not longer: after it another reader has a turn."""
_CALL_ROWS: Final = 10_000
BUSY_SECONDS: Final = 600.0
"""How long a fetch waits for busy peers without receiving a row."""
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0


_PEERS_FAULT: Final = (
    DaemonUnreachableError,
    DigestMismatchError,
    FormatError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolMismatchError,
)


class FetchSources:
    """The peers of one fetch. `note` is told of each one that is dropped, and why.

    A peer that is busy is waited for, at most BUSY_SECONDS without a row from anybody.
    """

    def __init__(
        self,
        addresses: Iterable[AgentAddress],
        connect: Callable[[AgentAddress], Peer],
        note: Callable[[str], None],
        serves_at: str = "",
    ) -> None:
        self._given = tuple(dict.fromkeys(addresses))
        self._addresses = list(self._given)
        self._connect = connect
        self._note = note
        self._serves_at = serves_at
        self._dropped: set[AgentAddress] = set()
        self._failure: WeightdError | None = None

    def manifest(self, name: str) -> FleetManifest:
        """The manifest, from the first peer that has it. Errors: those of the last peer."""
        for address in list(self._addresses):
            try:
                with self._connect(address) as peer:
                    return peer.manifest(name)
            except WeightdError as error:
                self._drop(address, error)
        raise self._gone()

    def receive(
        self, name: str, wanted: dict[bytes, int], staging: StagingFolder, advance: Callable[[int], None]
    ) -> int:
        """Receive rows, given as digests and lengths, into a staging folder. Returns the bytes that were kept.

        `advance` is called with bytes that were verified. Errors: those of the last peer, or of the disk.
        """
        rest = dict(wanted)
        deadline, pause = time.monotonic() + BUSY_SECONDS, _PAUSE
        while rest:
            before = len(rest)
            busy = self._round(name, rest, staging, advance)
            if not self._addresses:
                raise self._gone()
            if len(rest) < before:
                deadline, pause = time.monotonic() + BUSY_SECONDS, _PAUSE
            elif busy is not None:
                if time.monotonic() > deadline:
                    raise busy
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        return sum(wanted.values())

    def _round(
        self, name: str, rest: dict[bytes, int], staging: StagingFolder, advance: Callable[[int], None]
    ) -> DaemonBusyError | None:
        """Ask each peer for one call's rows, and take what is received out of `rest`."""
        busy: DaemonBusyError | None = None
        for address in list(self._addresses):
            if not rest:
                break
            try:
                self._call(address, name, rest, staging, advance)
            except DaemonBusyError as error:
                busy = error
                self._add(error.sources if isinstance(error, PeerBusyError) else ())
            except NotFoundError as error:
                if address in self._given:
                    self._drop(address, error)
                else:  # another peer named it, as one that has begun to fetch
                    busy = DaemonBusyError(f"{error}; waited for it to have them")
            except _PEERS_FAULT as error:
                self._drop(address, error)
        return busy

    def _call(
        self,
        address: AgentAddress,
        name: str,
        rest: dict[bytes, int],
        staging: StagingFolder,
        advance: Callable[[int], None],
    ) -> None:
        batch: list[tuple[bytes, int]] = []
        total = 0
        for digest, length in rest.items():
            if batch and (total + length > _CALL_BYTES or len(batch) == _CALL_ROWS):
                break
            batch.append((digest, length))
            total += length
        with self._connect(address) as peer:
            pieces = peer.rows(name, batch, self._serves_at)
            try:
                for number, (digest, length) in enumerate(batch):
                    with staging.receive(digest, length) as row:
                        while row.received < length:
                            of, data = next(pieces, (-1, b""))
                            if of != number:
                                raise FormatError(f"peer {address}: ends before all rows have come")
                            row.write(data)
                        try:
                            staging.enter(row)
                        except DigestMismatchError as error:
                            raise DigestMismatchError(f"peer {address}: {error}") from None
                    del rest[digest]
                    advance(length)
                for _ in pieces:  # the end, or more than was asked for
                    raise FormatError(f"peer {address}: sends more than was asked for")
            finally:
                pieces.close()

    def _add(self, addresses: Iterable[AgentAddress]) -> None:
        """Try further peers first: who sends us there has enough readers."""
        known = {*self._addresses, *self._dropped}
        new = [address for address in dict.fromkeys(addresses) if address not in known]
        self._addresses = (new + self._addresses)[:MAX_SOURCES]

    def _drop(self, address: AgentAddress, error: WeightdError) -> None:
        self._failure = error
        self._addresses.remove(address)
        self._dropped.add(address)
        self._note(f"{error}; not asked again")

    def _gone(self) -> WeightdError:
        assert self._failure is not None or not self._addresses
        return self._failure or DaemonUnreachableError("no peer to fetch from; give --from HOST:PORT")
