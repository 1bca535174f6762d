"""Slots: bump allocation, what is given back, and tensors that are to lie one behind the other."""

from __future__ import annotations

import pytest

from weightd_daemon.loader import slots as slots_module
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.slots import LoaderSlot, LoaderSlotRow, LoaderSlots

KIB = 1 << 10


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "SEGMENT_BYTES", 64 * KIB)


class Daemon:
    """The daemon's end of the channel: grants what is wanted, or the lengths it was given, as segments 1, 2, …"""

    def __init__(self, *lengths: int) -> None:
        self._lengths = list(lengths)
        self.asked: list[tuple[list[int], int]] = []

    def call(self, question: wire.ToDaemon) -> wire.ToLoader:
        assert question.WhichOneof("body") == "grant"
        ends = list(question.grant.ends)
        self.asked.append((ends, question.grant.need))
        length = self._lengths.pop(0) if self._lengths else ends[-1]
        return wire.ToLoader(grant=wire.Extent(segment=len(self.asked), offset=0, length=length))


def slots(daemon: Daemon, *sizes: int, frugal: bool = False) -> LoaderSlots:
    return LoaderSlots(daemon, sizes, frugal=frugal)  # type: ignore[arg-type]  # what slots need of a channel


def test_what_is_asked_for_ends_where_something_ends() -> None:
    daemon = Daemon()
    places = slots(daemon, 30 * KIB, 20 * KIB, 20 * KIB, 100 * KIB, KIB)
    assert [places.allocate(size)[:2] for size in (30 * KIB, 20 * KIB, 20 * KIB)] == [(1, 0), (1, 30 * KIB), (2, 0)]
    assert places.allocate(50 * KIB, LoaderSlotRow(100 * KIB))[:2] == (3, 0)
    assert places.allocate(50 * KIB)[:2] == (3, 50 * KIB)
    assert places.allocate(KIB)[:2] == (4, 0)
    assert daemon.asked == [
        ([30 * KIB, 50 * KIB], 30 * KIB),
        ([20 * KIB], 20 * KIB),
        ([100 * KIB], 50 * KIB),  # more than a segment has otherwise
        ([KIB], KIB),
    ]


def test_neighbours_that_are_given_back_are_one_place() -> None:
    daemon = Daemon()
    places = slots(daemon, 40 * KIB)
    taken = [places.allocate(10 * KIB) for _ in range(4)]
    for at in (0, 3, 2, 1):
        places.give_back(taken[at])
    assert places.allocate(40 * KIB) == LoaderSlot(1, 0, 40 * KIB)
    assert len(daemon.asked) == 1


def test_the_least_place_that_will_do_is_used_again() -> None:
    places = slots(Daemon(), 60 * KIB)
    first, second, third, _ = (places.allocate(size * KIB) for size in (10, 5, 20, 5))
    places.give_back(first)
    places.give_back(third)
    assert places.allocate(8 * KIB)[:2] == first[:2]
    assert places.allocate(20 * KIB)[:2] == third[:2]
    assert second.size == 5 * KIB


def test_what_is_together_lies_behind_each_other_and_not_in_what_was_given_back() -> None:
    daemon = Daemon()
    places = slots(daemon, 4 * KIB, 4 * KIB, 12 * KIB, 4 * KIB)
    first, second = places.allocate(4 * KIB), places.allocate(4 * KIB)
    places.give_back(first)
    together = LoaderSlotRow(12 * KIB)
    taken = [places.allocate(4 * KIB, together)]
    places.give_back(second)  # now there is a place of 8 KiB that each of them fits
    taken += [places.allocate(4 * KIB, together) for _ in range(2)]
    assert [slot.offset for slot in taken] == [8 * KIB, 12 * KIB, 16 * KIB]
    assert places.allocate(8 * KIB).offset == 0
    assert len(daemon.asked) == 1


def test_what_was_given_back_holds_a_group_where_it_is_large_enough() -> None:
    daemon = Daemon()
    places = slots(daemon, 4 * KIB, 8 * KIB, 8 * KIB)
    places.allocate(4 * KIB)
    one, other = LoaderSlotRow(8 * KIB), LoaderSlotRow(8 * KIB)
    for slot in [places.allocate(4 * KIB, one) for _ in range(2)]:
        places.give_back(slot)
    assert [places.allocate(4 * KIB, other).offset for _ in range(2)] == [4 * KIB, 8 * KIB]
    assert len(daemon.asked) == 1


def test_what_is_apart_is_placed_like_the_rest() -> None:
    places = slots(Daemon(), 16 * KIB)
    together = LoaderSlotRow(16 * KIB)
    first, second = places.allocate(4 * KIB, together), places.allocate(4 * KIB, together)
    places.give_back(first)  # its bytes are shared
    together.apart = True
    assert places.allocate(4 * KIB, together) == first
    assert places.allocate(4 * KIB, together).offset == second.offset + 4 * KIB


@pytest.mark.parametrize("frugal", [False, True])
def test_a_group_asks_for_more_memory_where_that_was_promised(frugal: bool) -> None:
    """The place for single tensors that is left over does not break it up."""
    daemon = Daemon()
    places = slots(daemon, 8 * KIB, 60 * KIB, frugal=frugal)
    slot = places.allocate(8 * KIB)
    places.give_back(slot)
    together = LoaderSlotRow(60 * KIB)
    taken = [places.allocate(6 * KIB, together)[:2] for _ in range(2)]
    assert taken == ([(1, 0), (2, 0)] if frugal else [(2, 0), (2, 6 * KIB)])


def test_memory_in_pieces_is_used_to_the_end() -> None:
    """Once less than what stays together was granted, nothing is left lying for the sake of order."""
    daemon = Daemon(10 * KIB, 10 * KIB)
    places = slots(daemon, 12 * KIB, 12 * KIB)
    one, other = LoaderSlotRow(12 * KIB), LoaderSlotRow(12 * KIB)
    assert [places.allocate(4 * KIB, one)[:2] for _ in range(3)] == [(1, 0), (1, 4 * KIB), (2, 0)]
    assert [places.allocate(4 * KIB, other)[:2] for _ in range(2)] == [(2, 4 * KIB), (3, 0)]
    assert len(daemon.asked) == 3


def test_only_so_many_places_are_remembered() -> None:
    daemon = Daemon()
    places = slots(daemon, *[KIB // 2] * 100)
    taken = [places.allocate(KIB // 2) for _ in range(100)]
    for slot in taken[::2]:
        places.give_back(slot)
    again = [places.allocate(KIB // 2) for _ in range(50)]
    assert len(set(again) & set(taken)) == slots_module._KEPT
