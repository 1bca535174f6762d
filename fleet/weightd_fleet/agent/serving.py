"""What an agent serves, and to how many readers at once; one reader too many is told of others that have the bytes."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from weightd.errors import DrainingError, InvalidReferenceError, NotFoundError

from .listing import NodeListing
from .local_blobs import BlobReaders, StateBlobs, published_files
from .peer_errors import MAX_SOURCES, PeerBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightd_fleet.core.manifest import FleetManifest
    from weightd_fleet.publishing.state import PublishedState

    from .addresses import AgentAddress
    from .inventory import NodeInventory
    from .resident import ResidentTensors

MAX_ROWS: Final = 100_000
"""Most rows of one read."""
_MAX_NAMES: Final = 1000


class ReadAdmission:
    """Admits at most `most` reads at once, and remembers for each checkpoint who has read it and serves it now.

    Of those who follow the inventory it admits `watchers`, and of those who have this node fetch `fetches`.
    """

    def __init__(self, most: int, watchers: int = 8, fetches: int = 16) -> None:
        self._most = most
        self._watchers = threading.BoundedSemaphore(watchers)
        self._most_fetches = fetches
        self._fetches = threading.BoundedSemaphore(fetches)
        self._lock = threading.Lock()
        self._reading = 0
        self._readers: OrderedDict[str, list[AgentAddress]] = OrderedDict()
        self.draining = False

    @contextlib.contextmanager
    def admitted(self, name: str, serves_at: AgentAddress | None) -> Iterator[None]:
        """Around a read. Errors: PeerBusyError, DrainingError."""
        with self._lock:
            if self.draining:
                raise DrainingError("this agent is drained and serves nothing new; ask another one")
            if self._reading >= self._most:
                sources = [one for one in self._readers.get(name, []) if one != serves_at]
                raise PeerBusyError(f"{self._most} reads are under way, and no more may be; try again", sources)
            self._reading += 1
        try:
            yield
            if serves_at is not None and not serves_at.is_any:  # as agents of 0.2 say that listen everywhere
                self._remember(name, serves_at)
        finally:
            with self._lock:
                self._reading -= 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around following the inventory. Errors: PeerBusyError."""
        if not self._watchers.acquire(blocking=False):
            raise PeerBusyError("too many follow the inventory; ask without following it")
        try:
            yield
        finally:
            self._watchers.release()

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Around a fetch for a client. Errors: PeerBusyError."""
        if not self._fetches.acquire(blocking=False):
            raise PeerBusyError(f"{self._most_fetches} fetches are under way here, and no more may be; try again")
        try:
            yield
        finally:
            self._fetches.release()

    def _remember(self, name: str, reader: AgentAddress) -> None:
        with self._lock:
            readers = self._readers.setdefault(name, [])
            self._readers.move_to_end(name)
            if reader not in readers:
                readers.insert(0, reader)
                del readers[MAX_SOURCES:]
            while len(self._readers) > _MAX_NAMES:
                self._readers.popitem(last=False)


class ServedBlobs:
    """The checkpoints and blobs that this node can serve: published, and resident or in unchanged files."""

    def __init__(self, state: PublishedState, resident: ResidentTensors) -> None:
        self._state = state
        self._resident = resident
        self._listing = NodeListing(state, resident)

    def manifest(self, name: str) -> FleetManifest:
        """Errors: NotFoundError, FormatError, InvalidReferenceError (no name)."""
        return self._state.manifest(name)

    def inventory(self, *, draining: bool) -> NodeInventory:
        """What this node can serve, and what the devices of its daemon hold."""
        return self._listing.inventory(draining=draining)

    @contextlib.contextmanager
    def rows(self, name: str, digests: Sequence[bytes]) -> Iterator[BlobReaders]:
        """Hold some blobs of a checkpoint. Errors: NotFoundError, FormatError, InvalidReferenceError."""
        if len(digests) > MAX_ROWS:
            raise InvalidReferenceError(f"{len(digests)} rows are asked for, over the limit of {MAX_ROWS}")
        manifest = self.manifest(name)
        lengths = {row.digest: row.length for row in manifest.tensors}
        own = StateBlobs(self._state, manifest)
        wanted = {digest for digest in digests if digest not in own}
        for digest in wanted - lengths.keys():
            raise NotFoundError(f"{name}: has no row {digest.hex()[:64]!r}")
        with (
            self._resident.hold(wanted, {lengths[digest] for digest in wanted}) as held,
            published_files(self._state, [name], wanted) as files,
        ):
            found = BlobReaders([own, held, files])
            for digest in wanted:
                if lengths[digest] and digest not in found:
                    row = digest.hex()[:16]
                    raise NotFoundError(f"{name}: its row {row} is not on this node any more; ask another one")
            yield found
