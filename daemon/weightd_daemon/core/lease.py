"""Leases: which process holds which checkpoint. The kernel decides whether one is still held; these are the books."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weightd.errors import DrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator


@dataclass(slots=True, unsafe_hash=True)
class Holder:
    """Who took a lease: connection number, process (None where it cannot be known), user, command line.

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


NOBODY = Holder(connection=0, pid=None, uid=None, command="")
"""Who holds a lease that an earlier daemon gave, until the holder says so."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One hold on one checkpoint since `since` (seconds since the epoch).

    A *waiting* lease keeps a finished load for somebody who has not attached yet; it has no lock and ends by word.
    """

    number: int
    checkpoint: Hashable
    holder: Holder
    since: float
    waiting: bool


@dataclass(frozen=True, slots=True)
class Attached:
    """A lease was taken. Waiting leases are not told of: nobody has mapped anything."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Detached:
    """A lease is struck out: its lock was found gone, or its checkpoint was lost."""

    lease: Lease


class Leases:
    """All leases. `probe(lease)` asks the kernel whether a lease's lock is still there.

    What is taken and struck out, but for waiting leases, is told to `on_event`. While `draining` none is taken.
    """

    def __init__(
        self, probe: Callable[[Lease], bool], on_event: Callable[[Attached | Detached], None] = lambda _: None
    ) -> None:
        self.draining = False
        self._probe = probe
        self._on_event = on_event
        self._leases: dict[int, Lease] = {}
        self._by_checkpoint: dict[Hashable, set[int]] = {}
        self._by_connection: dict[Hashable, set[int]] = {}
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
            raise DrainingError("the daemon is draining: it lends and loads nothing new; try again when it is back")

    def take(self, checkpoint: Hashable, holder: Holder, now: float, *, waiting: bool = False) -> Lease:
        """Enter a new lease. Numbers are never used twice. Errors: DrainingError."""
        self.admit()
        self._last += 1
        lease = Lease(self._last, checkpoint, holder, now, waiting)
        self._enter(lease)
        if not waiting:
            self._on_event(Attached(lease))
        return lease

    def inherit(self, number: int, checkpoint: Hashable, holder: Holder, now: float) -> None:
        """Enter a lease that an earlier daemon gave, and whose lock is there. Errors: ValueError (it is entered)."""
        if number in self._leases:
            raise ValueError(f"lease {number} is in the books")
        self._enter(Lease(number, checkpoint, holder, now, waiting=False))
        self._last = max(self._last, number)

    def inherit_some(self, checkpoint: Hashable, holder: Holder, now: float) -> int:
        """Enter one lease for all of an earlier daemon's that cannot be told apart. Returns its number."""
        self._last += 1
        self._enter(Lease(self._last, checkpoint, holder, now, waiting=False))
        return self._last

    def begin_after(self, number: int) -> None:
        """Give only greater numbers from now on."""
        self._last = max(self._last, number)

    def attribute(self, number: int, holder: Holder) -> None:
        """Say who holds a lease that is in the books. It is no new one, and none has ended."""
        lease = self._strike(number)
        if lease is None:
            raise KeyError(number)
        self._enter(replace(lease, holder=holder))

    def end(self, number: int) -> None:
        """Strike a lease out; a number that is not there is no error."""
        lease = self._strike(number)
        if lease is not None and not lease.waiting:
            self._on_event(Detached(lease))

    def count(self, checkpoint: Hashable) -> int:
        """Leases in the books, without asking the kernel."""
        return len(self._by_checkpoint.get(checkpoint, ()))

    def of(self, checkpoint: Hashable) -> list[Lease]:
        """The leases that hold the checkpoint now; those whose lock has gone are struck out."""
        return self._refresh(sorted(self._by_checkpoint.get(checkpoint, ())))

    def refresh(self) -> list[Lease]:
        """All leases that are held now, oldest first."""
        return self._refresh(sorted(self._leases))

    def of_connection(self, connection: int) -> list[Lease]:
        """Leases in the books that were taken on a connection."""
        return [self._leases[number] for number in sorted(self._by_connection.get(connection, ()))]

    def held_by(self, uid: int | None, most: int) -> int:
        """Leases of a user's processes, also of those that wait; the kernel is asked where the books have `most`."""
        theirs = [number for number, lease in self._leases.items() if lease.holder.uid == uid]
        return len(theirs) if len(theirs) < most else len(self._refresh(theirs))

    def look(self, number: int) -> bool:
        """Whether a lease is held now."""
        return bool(self._refresh([number]))

    def _strike(self, number: int) -> Lease | None:
        lease = self._leases.pop(number, None)
        if lease is not None:
            _drop(self._by_checkpoint, lease.checkpoint, number)
            _drop(self._by_connection, lease.holder.connection, number)
        return lease

    def _enter(self, lease: Lease) -> None:
        self._leases[lease.number] = lease
        self._by_checkpoint.setdefault(lease.checkpoint, set()).add(lease.number)
        self._by_connection.setdefault(lease.holder.connection, set()).add(lease.number)

    def _refresh(self, numbers: list[int]) -> list[Lease]:
        held = []
        for number in numbers:
            lease = self._leases.get(number)
            if lease is None:
                continue
            if lease.waiting or self._probe(lease):
                held.append(lease)
            else:
                self.end(number)
        return held


def named(leases: Iterable[Lease]) -> str:
    """Who holds leases, each process once and at most five: "pid 12 (python serve.py), pid 13 (…) and 4 more"."""
    holders = list(dict.fromkeys(str(lease.holder) for lease in leases))
    more = f" and {len(holders) - 5} more" if len(holders) > 5 else ""
    return ", ".join(holders[:5]) + more


def _drop(index: dict[Hashable, set[int]], key: Hashable, number: int) -> None:
    numbers = index[key]
    numbers.discard(number)
    if not numbers:
        del index[key]
