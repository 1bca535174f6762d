"""Leases and the eviction policy."""

from __future__ import annotations

import pytest

from weightd.errors import DrainingError
from weightd_daemon.core.lease import MOST_ASKED, Lease, LeaseBegun, LeaseEnded, LeasePeer, LeaseTable, named

PEER = LeasePeer(connection=7, pid=100, uid=1000, command="python serve.py")


class Kernel:
    """Says whose lock is there, and counts how often it is asked."""

    def __init__(self) -> None:
        self.locks: set[int] = set()
        self.asked = 0

    def probe(self, lease: Lease) -> bool:
        self.asked += 1
        return lease.number in self.locks

    def take(self, leases: LeaseTable, checkpoint: str) -> Lease:
        lease = leases.begin(checkpoint, PEER, 1.0)
        self.locks.add(lease.number)
        return lease


def test_a_lease_ends_when_its_lock_has_gone() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    first, second = kernel.take(leases, "a"), kernel.take(leases, "a")
    assert leases.of("a") == [first, second]
    kernel.locks.discard(first.number)
    assert leases.count("a") == 2, "the books do not know yet"
    assert leases.of("a") == [second]
    assert (leases.count("a"), len(leases), leases.get(first.number)) == (1, 1, None)


def test_it_stays_ended_even_if_a_lock_seems_to_come_back() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    lease = kernel.take(leases, "a")
    kernel.locks.clear()
    assert not leases.look(lease.number)
    kernel.locks.add(lease.number)
    assert not leases.look(lease.number)


def test_a_waiting_lease_needs_no_lock_and_ends_by_word() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    lease = leases.begin("a", PEER, 1.0, waiting=True)
    assert leases.of("a") == [lease]
    assert kernel.asked == 0
    leases.end(lease.number)
    leases.end(lease.number)
    assert leases.of("a") == []
    assert list(leases) == []


def test_numbers_are_never_used_twice() -> None:
    leases = LeaseTable(Kernel().probe)
    first = leases.begin("a", PEER, 1.0)
    leases.end(first.number)
    assert leases.begin("a", PEER, 2.0).number != first.number


def test_a_checkpoint_is_asked_for_its_own_leases_only() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    kernel.take(leases, "a")
    mine = kernel.take(leases, "b")
    assert leases.of("b") == [mine]
    assert kernel.asked == 1


def test_refresh_looks_at_all_and_connections_know_their_own() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    first, second = kernel.take(leases, "a"), kernel.take(leases, "b")
    other = leases.begin("b", LeasePeer(8, 1, None, ""), 2.0, waiting=True)
    assert leases.of_connection(7) == [first, second]
    kernel.locks.discard(first.number)
    assert leases.refresh() == [second, other]
    assert leases.of_connection(7) == [second]


def test_leases_that_are_mapped_are_told_of() -> None:
    kernel = Kernel()
    told: list[LeaseBegun | LeaseEnded] = []
    leases = LeaseTable(kernel.probe, told.append)
    leases.end(leases.begin("a", PEER, 1.0, waiting=True).number)
    assert told == [], "nobody has mapped anything"
    first, second = kernel.take(leases, "a"), kernel.take(leases, "b")
    leases.refresh()
    assert told == [LeaseBegun(first), LeaseBegun(second)]
    kernel.locks.clear()
    leases.of("b")
    leases.end(first.number)
    leases.end(first.number)
    leases.refresh()
    assert told[2:] == [LeaseEnded(second), LeaseEnded(first)]


def test_while_it_drains_no_lease_is_taken() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    held = kernel.take(leases, "a")
    leases.draining = True
    for waiting in (False, True):
        with pytest.raises(DrainingError, match="accepts no attaches or loads"):
            leases.begin("a", PEER, 1.0, waiting=waiting)
    assert leases.of("a") == [held]
    leases.draining = False
    assert kernel.take(leases, "a").number == held.number + 1


def test_who_holds_in_words() -> None:
    leases = [Lease(n, "a", LeasePeer(n, n // 2, 0, f"c{n // 2}"), 0.0, waiting=False) for n in range(14)]
    assert named(leases[:4]) == "pid 0 (c0), pid 1 (c1)"
    assert named(leases) == "pid 0 (c0), pid 1 (c1), pid 2 (c2), pid 3 (c3), pid 4 (c4) and 2 more"


def test_who_cannot_be_known_is_said_to_be_unknown() -> None:
    holders = [
        LeasePeer(1, None, 1000, ""),
        LeasePeer(2, None, 1000, ""),
        LeasePeer(3, None, None, ""),
        LeasePeer(4, 9, 0, ""),
    ]
    leases = [Lease(number, "a", holder, 0.0, waiting=False) for number, holder in enumerate(holders)]
    assert named(leases) == "pid unknown (uid 1000), pid unknown, pid 9"


def test_saying_who_holds_a_lease_is_no_new_lease_and_no_end() -> None:
    told: list[object] = []
    leases = LeaseTable(lambda _: True, told.append)
    leases.inherit(5, "a", LeasePeer(connection=0, pid=None, uid=1000, command=""), 1.0)
    leases.attribute(5, PEER)
    (lease,) = leases.of("a")
    assert (lease.number, lease.peer, leases.of_connection(PEER.connection)) == (5, PEER, [lease])
    assert told == []
    assert leases.begin("a", PEER, 2.0).number == 6


def test_a_lease_of_an_earlier_daemon_is_entered_once() -> None:
    leases = LeaseTable(lambda _: True)
    leases.inherit(5, "a", PEER, 1.0)
    with pytest.raises(ValueError, match="lease 5 is in the books"):
        leases.inherit(5, "b", PEER, 2.0)
    assert [(lease.number, lease.checkpoint) for lease in leases] == [(5, "a")]
    assert leases.count("b") == 0


# -- many leases -----------------------------------------------------------------------------------------------------


def many(kernel: Kernel, leases: LeaseTable, number: int) -> list[Lease]:
    taken = [kernel.take(leases, "a") for _ in range(number)]
    kernel.asked = 0
    return taken


def test_a_sweep_looks_at_few_at_a_time_and_at_all_in_turn() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    taken = many(kernel, leases, 25)
    assert leases.sweep(10), "there are more"
    assert kernel.asked == 10
    kernel.locks -= {taken[3].number, taken[20].number}
    assert leases.sweep(10)
    assert kernel.asked == 20
    leases.sweep(10)
    assert leases.get(taken[20].number) is None
    assert leases.get(taken[3].number) is not None, "it has its turn in the next round"
    for _ in range(3):
        leases.sweep(10)
    assert len(leases) == 23
    assert not leases.sweep(30)


def test_ended_leases_make_a_step_of_the_sweep_shorter() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    many(kernel, leases, 100)
    kernel.locks.clear()
    leases.sweep(40)
    assert kernel.asked == 5
    while len(leases):
        leases.sweep(40)
    assert kernel.asked == 100


def test_leases_of_whom_has_gone_are_looked_at_first() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    taken = many(kernel, leases, 50)
    kernel.locks -= {lease.number for lease in taken[-2:]}
    leases.look_soon([taken[-1].number, taken[-1].number, 999])
    assert (len(leases), kernel.asked) == (49, 1)
    kernel.locks.clear()
    leases.look_soon(lease.number for lease in taken)
    assert len(leases) == 49 - 32, "not all in one step: to tell of an end takes longer than to find it"
    leases.sweep(3 * 8)
    assert len(leases) == 49 - 35
    assert leases.get(taken[35].number) is not None


def test_waiting_leases_are_not_swept_and_attributed_ones_are_once() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    waiting = leases.begin("a", PEER, 1.0, waiting=True)
    lease = kernel.take(leases, "a")
    leases.attribute(lease.number, LeasePeer(9, 9, 9, "other"))
    kernel.asked = 0
    assert not leases.sweep(10)
    assert kernel.asked == 1
    assert (leases.waiting_of(7), leases.of_connection(9)) == ([waiting], [leases.get(lease.number)])


def test_who_asks_about_many_relies_on_the_sweep() -> None:
    """A look at all by each who asks would be as many steps of the loop as there are askers."""
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    taken = many(kernel, leases, MOST_ASKED + 1)
    kernel.locks.discard(taken[0].number)
    assert (leases.held(), len(leases.refresh()), len(leases.of("a"))) == (MOST_ASKED + 1,) * 3
    assert leases.held_by(1000, 3) == MOST_ASKED + 1
    assert kernel.asked == 0
    leases.sweep(MOST_ASKED + 1)
    assert leases.held() == MOST_ASKED


def test_who_asks_again_and_again_gets_what_the_sweep_finds() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    many(kernel, leases, 100)
    for _ in range(1000):
        leases.held()
    assert kernel.asked <= 8 * MOST_ASKED
    kernel.locks.clear()
    leases.sweep(8 * 100)
    assert leases.held() == 0


def test_whether_a_checkpoint_is_held_is_exact_for_any_number_and_asks_for_no_more_than_one_that_is() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    taken = many(kernel, leases, 3 * MOST_ASKED)
    assert leases.is_held("a")
    assert kernel.asked == 1
    kernel.locks = {taken[-1].number}
    assert leases.is_held("a")
    kernel.locks.clear()
    assert not leases.is_held("a")
    assert len(leases) == 0


def test_the_limit_of_a_user_is_looked_up_by_user() -> None:
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    for uid in (1, 2, 2, None):
        kernel.locks.add(leases.begin("a", LeasePeer(1, 1, uid, ""), 1.0).number)
    assert [leases.held_by(uid, 9) for uid in (1, 2, 3, None)] == [1, 2, 0, 1]
    assert kernel.asked == 0, "it is not asked below the limit"
    kernel.locks.clear()
    assert [leases.held_by(uid, 1) for uid in (1, 2, 3, None)] == [0, 0, 0, 0]
    assert (len(leases), leases._by_user, leases._by_checkpoint) == (0, {}, {})


def test_who_keeps_the_lock_hears_of_each_end_once() -> None:
    kernel = Kernel()
    forgotten: list[int] = []
    leases = LeaseTable(kernel.probe, forget=forgotten.append)
    first, second = kernel.take(leases, "a"), kernel.take(leases, "a")
    leases.attribute(first.number, LeasePeer(9, 9, 9, "other"))
    assert forgotten == []
    kernel.locks.clear()
    leases.refresh()
    leases.end(second.number)
    assert forgotten == [first.number, second.number]


def test_who_asks_strikes_out_few_that_have_ended_and_leaves_the_others_to_the_sweep() -> None:
    """To strike one out and tell of it takes longer than to look: a process with many may just have ended."""
    kernel = Kernel()
    leases = LeaseTable(kernel.probe)
    many(kernel, leases, 100)
    kernel.locks.clear()
    assert leases.held() == 100 - MOST_ASKED // 8
    leases.sweep(8 * 100)
    assert leases.held() == 0
