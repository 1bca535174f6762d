"""Leases and the eviction policy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from weightd.errors import DrainingError
from weightd_daemon.core.eviction import least_recently_used
from weightd_daemon.core.lease import Attached, Detached, Holder, Lease, Leases, named

HOLDER = Holder(connection=7, pid=100, uid=1000, command="python serve.py")


class Kernel:
    """Says whose lock is there, and counts how often it is asked."""

    def __init__(self) -> None:
        self.locks: set[int] = set()
        self.asked = 0

    def probe(self, lease: Lease) -> bool:
        self.asked += 1
        return lease.number in self.locks

    def take(self, leases: Leases, checkpoint: str) -> Lease:
        lease = leases.take(checkpoint, HOLDER, 1.0)
        self.locks.add(lease.number)
        return lease


def test_a_lease_ends_when_its_lock_has_gone() -> None:
    kernel = Kernel()
    leases = Leases(kernel.probe)
    first, second = kernel.take(leases, "a"), kernel.take(leases, "a")
    assert leases.of("a") == [first, second]
    kernel.locks.discard(first.number)
    assert leases.count("a") == 2, "the books do not know yet"
    assert leases.of("a") == [second]
    assert (leases.count("a"), len(leases), leases.get(first.number)) == (1, 1, None)


def test_it_stays_ended_even_if_a_lock_seems_to_come_back() -> None:
    kernel = Kernel()
    leases = Leases(kernel.probe)
    lease = kernel.take(leases, "a")
    kernel.locks.clear()
    assert not leases.look(lease.number)
    kernel.locks.add(lease.number)
    assert not leases.look(lease.number)


def test_a_waiting_lease_needs_no_lock_and_ends_by_word() -> None:
    kernel = Kernel()
    leases = Leases(kernel.probe)
    lease = leases.take("a", HOLDER, 1.0, waiting=True)
    assert leases.of("a") == [lease]
    assert kernel.asked == 0
    leases.end(lease.number)
    leases.end(lease.number)
    assert leases.of("a") == []
    assert list(leases) == []


def test_numbers_are_never_used_twice() -> None:
    leases = Leases(Kernel().probe)
    first = leases.take("a", HOLDER, 1.0)
    leases.end(first.number)
    assert leases.take("a", HOLDER, 2.0).number != first.number


def test_a_checkpoint_is_asked_for_its_own_leases_only() -> None:
    kernel = Kernel()
    leases = Leases(kernel.probe)
    kernel.take(leases, "a")
    mine = kernel.take(leases, "b")
    assert leases.of("b") == [mine]
    assert kernel.asked == 1


def test_refresh_looks_at_all_and_connections_know_their_own() -> None:
    kernel = Kernel()
    leases = Leases(kernel.probe)
    first, second = kernel.take(leases, "a"), kernel.take(leases, "b")
    other = leases.take("b", Holder(8, 1, None, ""), 2.0, waiting=True)
    assert leases.of_connection(7) == [first, second]
    kernel.locks.discard(first.number)
    assert leases.refresh() == [second, other]
    assert leases.of_connection(7) == [second]


def test_leases_that_are_mapped_are_told_of() -> None:
    kernel = Kernel()
    told: list[Attached | Detached] = []
    leases = Leases(kernel.probe, told.append)
    leases.end(leases.take("a", HOLDER, 1.0, waiting=True).number)
    assert told == [], "nobody has mapped anything"
    first, second = kernel.take(leases, "a"), kernel.take(leases, "b")
    leases.refresh()
    assert told == [Attached(first), Attached(second)]
    kernel.locks.clear()
    leases.of("b")
    leases.end(first.number)
    leases.end(first.number)
    leases.refresh()
    assert told[2:] == [Detached(second), Detached(first)]


def test_while_it_drains_no_lease_is_taken() -> None:
    kernel = Kernel()
    leases = Leases(kernel.probe)
    held = kernel.take(leases, "a")
    leases.draining = True
    for waiting in (False, True):
        with pytest.raises(DrainingError, match="lends and loads nothing new"):
            leases.take("a", HOLDER, 1.0, waiting=waiting)
    assert leases.of("a") == [held]
    leases.draining = False
    assert kernel.take(leases, "a").number == held.number + 1


def test_who_holds_in_words() -> None:
    leases = [Lease(n, "a", Holder(n, n // 2, 0, f"c{n // 2}"), 0.0, waiting=False) for n in range(14)]
    assert named(leases[:4]) == "pid 0 (c0), pid 1 (c1)"
    assert named(leases) == "pid 0 (c0), pid 1 (c1), pid 2 (c2), pid 3 (c3), pid 4 (c4) and 2 more"


def test_who_cannot_be_known_is_said_to_be_unknown() -> None:
    holders = [Holder(1, None, 1000, ""), Holder(2, None, 1000, ""), Holder(3, None, None, ""), Holder(4, 9, 0, "")]
    leases = [Lease(number, "a", holder, 0.0, waiting=False) for number, holder in enumerate(holders)]
    assert named(leases) == "pid unknown (uid 1000), pid unknown, pid 9"


@dataclass
class Used:
    used: int
    pinned: bool = False
    leased: bool = False


def test_the_least_recently_used_goes_first_and_pins_and_leases_stay() -> None:
    old, new, newest = Used(1), Used(2), Used(3)
    pinned, leased = Used(0, pinned=True), Used(0, leased=True)
    order = least_recently_used([new, pinned, newest, leased, old], lambda used: used.leased)
    assert list(order) == [old, new, newest]


def test_only_as_many_leases_are_looked_up_as_are_needed() -> None:
    asked: list[Used] = []

    def is_leased(used: Used) -> bool:
        asked.append(used)
        return False

    things = [Used(at) for at in range(5)]
    assert next(least_recently_used(things, is_leased)) is things[0]
    assert asked == things[:1]


def test_saying_who_holds_a_lease_is_no_new_lease_and_no_end() -> None:
    told: list[object] = []
    leases = Leases(lambda _: True, told.append)
    leases.inherit(5, "a", Holder(connection=0, pid=None, uid=1000, command=""), 1.0)
    leases.attribute(5, HOLDER)
    (lease,) = leases.of("a")
    assert (lease.number, lease.holder, leases.of_connection(HOLDER.connection)) == (5, HOLDER, [lease])
    assert told == []
    assert leases.take("a", HOLDER, 2.0).number == 6
