"""Leases and the eviction policy."""

from __future__ import annotations

from dataclasses import dataclass

from weightd_daemon.core.eviction import least_recently_used
from weightd_daemon.core.lease import Holder, Lease, Leases

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


@dataclass
class Used:
    last_used: float
    pinned: bool = False
    leased: bool = False


def test_the_least_recently_used_goes_first_and_pins_and_leases_stay() -> None:
    old, new, newest = Used(1.0), Used(2.0), Used(3.0)
    pinned, leased = Used(0.0, pinned=True), Used(0.5, leased=True)
    order = least_recently_used([new, pinned, newest, leased, old], lambda used: used.leased)
    assert list(order) == [old, new, newest]


def test_only_as_many_leases_are_looked_up_as_are_needed() -> None:
    asked: list[Used] = []

    def is_leased(used: Used) -> bool:
        asked.append(used)
        return False

    things = [Used(float(at)) for at in range(5)]
    assert next(least_recently_used(things, is_leased)) is things[0]
    assert asked == things[:1]
