"""Leases: which process holds which checkpoint. The kernel knows whether a lease is held; this module records it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weightd.errors import DrainingError

from .revision import BooksRevision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator


@dataclass(slots=True, unsafe_hash=True)
class LeasePeer:
    """Process to which leases and loads belong: its connection's number, process ID (None if unknown), user, command.

    `uid` is None for a peer without an identity. `command` alone may change: to read it can take a while.
    """

    connection: int
    pid: int | None
    uid: int | None
    command: str = field(compare=False)

    def __str__(self) -> str:
        """For people: "pid 12 (python serve.py)", "pid unknown (uid 1000)"."""
        if self.pid is not None:
            return f"pid {self.pid}" + (f" ({self.command})" if self.command else "")
        return "pid unknown" + (f" (uid {self.uid})" if self.uid is not None else "")


NOBODY = LeasePeer(connection=0, pid=None, uid=None, command="")
"""The peer of a lease that an earlier daemon gave, until its process claims it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Record of one process's hold on one checkpoint since `since` (seconds since the epoch).

    A *waiting* lease keeps a finished load for somebody who has not attached yet; it has no lock and ends by word.
    """

    number: int
    checkpoint: Hashable
    peer: LeasePeer
    since: float
    waiting: bool


@dataclass(frozen=True, slots=True)
class LeaseBegun:
    """Core event: a lease was taken. Waiting leases have none: nobody has mapped anything."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Core event: a lease is struck out, because its lock was found gone or its checkpoint was lost."""

    lease: Lease


MOST_ASKED = 512
"""Leases up to which who asks gets an answer from the kernel. Where there are more, it is what the sweep has found."""

_ASKED_BETWEEN_SWEEPS = 8 * MOST_ASKED
"""Probes for all who ask, between two steps of the sweep."""

_AT_ONCE = 256
"""Probes for leases that may have ended, in the step that says so."""

_COST_OF_END = 8
"""What striking a lease out and telling of it costs, in probes."""


class LeaseTable:
    """Bookkeeping of all leases. `probe(lease)` asks the kernel whether a lease's lock is still there.

    What is taken and struck out, but for waiting leases, is told to `on_event`; `forget` gets the number of each lease
    that is struck out. While `draining` none is taken.

    The kernel tells nobody that a lock has gone. `sweep` looks for that, some leases at a time, and who asks relies on
    it where there are many: a lease may be listed for some seconds after its end, never the other way round. Only
    `is_held` is exact for any number.
    """

    def __init__(
        self,
        probe: Callable[[Lease], bool],
        on_event: Callable[[LeaseBegun | LeaseEnded], None] = lambda _: None,
        forget: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.draining = False
        self.revision = BooksRevision()
        self._probe = probe
        self._on_event = on_event
        self._forget = forget
        self.on_held: Callable[[Hashable], None] = lambda _: None
        """Told of a checkpoint that has got its first lease, or has none in the books any more."""
        self._leases: dict[int, Lease] = {}
        self._untold: dict[int, Lease] = {}
        """Leases that were taken, and of which nobody has been told yet."""
        self._by_checkpoint: dict[Hashable, dict[int, None]] = {}
        self._by_connection: dict[Hashable, dict[int, None]] = {}
        self._waiting: dict[Hashable, dict[int, None]] = {}
        self._by_user: dict[Hashable, dict[int, None]] = {}
        self._round: deque[int] = deque()
        self._soon: dict[int, None] = {}
        self._may_ask = _ASKED_BETWEEN_SWEEPS
        self._last = 0

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    def get(self, number: int) -> Lease | None:
        """The lease of that number, unless it has ended."""
        return self._leases.get(number)

    def admit(self) -> None:
        """Whether a lease may be taken, or a load begin that is to end in one. Errors: DrainingError."""
        if self.draining:
            raise DrainingError("the daemon is draining: it accepts no attaches or loads; try again when it is back")

    def begin(
        self, checkpoint: Hashable, peer: LeasePeer, now: float, *, waiting: bool = False, told: bool = True
    ) -> Lease:
        """Enter a new lease. Numbers are never used twice. Unless it is `told`, `tell` is due.

        Errors: DrainingError.
        """
        self.admit()
        self._last += 1
        lease = Lease(self._last, checkpoint, peer, now, waiting)
        self._enter(lease)
        if not waiting:
            self._untold[lease.number] = lease
        if told:
            self.tell(lease.number)
        return lease

    def tell(self, number: int) -> None:
        """Publish that a lease was taken, if that is still to be done. The end of one does it, too."""
        if (lease := self._untold.pop(number, None)) is not None:
            self._on_event(LeaseBegun(lease))

    def inherit(self, number: int, checkpoint: Hashable, peer: LeasePeer, now: float) -> None:
        """Enter a lease that an earlier daemon gave, and whose lock is there. Errors: ValueError (it is entered)."""
        if number in self._leases:
            raise ValueError(f"lease {number} is in the books")
        self._enter(Lease(number, checkpoint, peer, now, waiting=False))
        self._last = max(self._last, number)

    def inherit_some(self, checkpoint: Hashable, peer: LeasePeer, now: float) -> int:
        """Enter one lease for all of an earlier daemon's that cannot be told apart. Returns its number."""
        self._last += 1
        self._enter(Lease(self._last, checkpoint, peer, now, waiting=False))
        return self._last

    def number_above(self, number: int) -> None:
        """Give only greater numbers from now on."""
        self._last = max(self._last, number)

    def attribute(self, number: int, peer: LeasePeer) -> None:
        """Say who holds a lease that is in the books. It is no new one, and none has ended. Errors: KeyError."""
        lease = self._leases[number]
        self._drop(lease)
        self._index(replace(lease, peer=peer))

    def end(self, number: int) -> None:
        """Strike a lease out; a number that is not there is no error."""
        lease = self._leases.get(number)
        if lease is None:
            return
        self.tell(number)
        self._drop(lease)
        del self._leases[number]
        self._forget(number)
        if not lease.waiting:
            self._on_event(LeaseEnded(lease))

    def count(self, checkpoint: Hashable) -> int:
        """Leases in the books, without asking the kernel."""
        return len(self._by_checkpoint.get(checkpoint, ()))

    def is_held(self, checkpoint: Hashable) -> bool:
        """Whether any lease holds the checkpoint now: asks the kernel until one does."""
        return any(self.look(number) for number in list(self._by_checkpoint.get(checkpoint, ())))

    def of(self, checkpoint: Hashable) -> list[Lease]:
        """The leases that hold the checkpoint, oldest first; those whose lock has gone are struck out."""
        return self._refresh(self._by_checkpoint.get(checkpoint, ()))

    def refresh(self) -> list[Lease]:
        """All leases that are held, oldest first."""
        return self._refresh(self._leases)

    def held(self) -> int:
        """How many leases are held."""
        return self._count(self._leases)

    def of_connection(self, connection: int) -> list[Lease]:
        """Leases in the books that were taken on a connection."""
        return [self._leases[number] for number in sorted(self._by_connection.get(connection, ()))]

    @property
    def waiting(self) -> int:
        """How many leases in the books wait for an attach."""
        return sum(map(len, self._waiting.values()))

    def waiting_of(self, connection: int) -> list[Lease]:
        """Leases in the books that wait for a connection to attach."""
        return [self._leases[number] for number in self._waiting.get(connection, ())]

    def held_by(self, uid: int | None, most: int) -> int:
        """Leases of a user's processes, waiting ones included.

        The kernel is asked if the books have `most`, unless that takes too many probes (see the class).
        """
        theirs = self._by_user.get(uid, {})
        return len(theirs) if len(theirs) < most else self._count(theirs)

    def look(self, number: int) -> bool:
        """Whether a lease is held now."""
        lease = self._leases.get(number)
        if lease is None:
            return False
        if lease.waiting or self._probe(lease):
            return True
        self.end(number)
        return False

    def look_soon(self, numbers: Iterable[int]) -> None:
        """Look at leases that may have ended: at some now, and have the sweep look at the others before all else."""
        self._soon.update((number, None) for number in numbers if number in self._leases)
        left = _AT_ONCE
        while self._soon and left > 0:
            left -= self._cost(self._next_soon())

    @property
    def hurries(self) -> bool:
        """Whether leases of `look_soon` are still to be looked at."""
        return bool(self._soon)

    def sweep(self, most: int) -> bool:
        """Ask the kernel about at most `most` leases: those of `look_soon`, then the next ones, all of them in turn.

        Returns whether there are more than one such step looks at.
        """
        self._may_ask = _ASKED_BETWEEN_SWEEPS
        left, again = most, len(self._round)
        while left > 0 and (self._soon or again):
            if self._soon:
                left -= self._cost(self._next_soon())
                continue
            again -= 1
            number = self._round.popleft()
            left -= self._cost(number)
            if number in self._leases:
                self._round.append(number)
        return bool(self._soon) or len(self._round) > most

    def _next_soon(self) -> int:
        number = next(iter(self._soon))
        del self._soon[number]
        return number

    def _cost(self, number: int) -> int:
        """Look at a lease. Returns what that has cost, in probes."""
        ended = number in self._leases and not self.look(number)
        return _COST_OF_END if ended else 1

    def _enter(self, lease: Lease) -> None:
        if not lease.waiting:
            self._round.append(lease.number)
        self._index(lease)

    def _index(self, lease: Lease) -> None:
        self.revision.move()
        self._leases[lease.number] = lease
        first = lease.checkpoint not in self._by_checkpoint
        for index, key in self._indexes(lease):
            index.setdefault(key, {})[lease.number] = None
        if first:
            self.on_held(lease.checkpoint)

    def _drop(self, lease: Lease) -> None:
        self.revision.move()
        for index, key in self._indexes(lease):
            numbers = index[key]
            del numbers[lease.number]
            if not numbers:
                del index[key]
        if lease.checkpoint not in self._by_checkpoint:
            self.on_held(lease.checkpoint)

    def _indexes(self, lease: Lease) -> list[tuple[dict[Hashable, dict[int, None]], Hashable]]:
        found = [
            (self._by_checkpoint, lease.checkpoint),
            (self._by_connection, lease.peer.connection),
            (self._by_user, lease.peer.uid),
        ]
        return [*found, (self._waiting, lease.peer.connection)] if lease.waiting else found

    def _refresh(self, numbers: Collection[int]) -> list[Lease]:
        self._ask(numbers)
        return [self._leases[number] for number in sorted(numbers) if number in self._leases]

    def _count(self, numbers: Collection[int]) -> int:
        self._ask(numbers)
        return len(numbers)

    def _ask(self, numbers: Collection[int]) -> None:
        """Strike out which have ended, unless that takes too many probes: then the sweep has, or soon will."""
        left = MOST_ASKED
        if len(numbers) <= min(left, self._may_ask):
            self._may_ask -= len(numbers)
            for number in list(numbers):
                left -= self._cost(number)
                if left <= 0:
                    break


def named(leases: Iterable[Lease]) -> str:
    """Who holds leases, each process once and at most five: "pid 12 (python serve.py), pid 13 (…) and 4 more"."""
    peers = list(dict.fromkeys(str(lease.peer) for lease in leases))
    more = f" and {len(peers) - 5} more" if len(peers) > 5 else ""
    return ", ".join(peers[:5]) + more
