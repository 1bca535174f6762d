"""How a load's work is cut: nothing lost, nothing out of order, a lane for each thread where a file is long enough."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.daemon import eventually
from weightd.types import TensorSpec
from weightd_daemon.loader import schedule
from weightd_daemon.loader.schedule import (
    PIECE,
    LoaderTensor,
    LoaderUnit,
    arranged,
    batches,
    homes,
    lanes,
    lanes_in_file,
    most_lanes,
    on_threads,
    parted,
    repeated,
    rows,
    split,
    units,
)

MIB = 1 << 20
APART = range(8)
"""Files none of which shares lanes with others."""


def tensors(*files: list[int]) -> list[LoaderTensor]:
    """Tensors of these lengths, one after the other in each file."""
    found: list[LoaderTensor] = []
    for file, lengths in enumerate(files):
        offset = 0
        for length in lengths:
            found.append(LoaderTensor(len(found), file, TensorSpec(f"t{len(found)}", "U8", (length,), offset, length)))
            offset += length
    return found


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 300 * MIB), max_size=12)), max_size=6),
    st.integers(1, 4),
)
def test_lanes_hold_every_tensor_once_and_in_order(files: list[tuple[str, list[int]]], threads: int) -> None:
    components, lengths = [component for component, _ in files], [lengths for _, lengths in files]
    every, home = tensors(*lengths), homes(components, [sum(some) for some in lengths])
    cut = lanes(units(every), threads, home)
    assert [tensor for lane in cut for unit in lane for tensor in unit.tensors] == every
    assert all(len({home[unit.file] for unit in lane}) == 1 for lane in cut)
    assert all(len({components[unit.file] for unit in lane}) == 1 for lane in cut)
    assert len(cut) <= most_lanes(every, threads, home)
    part = every[::2]
    assert len(lanes(units(part), threads, home)) <= most_lanes(every, threads, home)


def test_short_neighbours_of_one_component_share_a_lane() -> None:
    sizes = [MIB, MIB, 63 * MIB, MIB, 70 * MIB, MIB, MIB]
    assert homes("aaaaaab", sizes) == [0, 0, 2, 2, 4, 5, 6]
    assert homes([], []) == []
    every = tensors(*[[1000]] * 300)
    home = homes([""] * 300, [1100] * 300)
    (lane,) = lanes(units(every), 4, home)
    assert len(lane) == 300
    assert most_lanes(every, 4, home) == 1


def test_groups_come_in_one_row() -> None:
    assert split([2, 0, 3], [5, 1, 4, 2, 3]) == [[5, 1], [], [4, 2, 3]]
    assert split([], []) == []


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[LoaderTensor], list[list[int]]]:
    """Tensors in files, and groups of some of them, in any order and across files."""
    every = tensors(*draw(st.lists(st.lists(st.integers(1, 300 * MIB), max_size=10), max_size=4)))
    order = draw(st.permutations([tensor.number for tensor in every]))
    sizes = draw(st.lists(st.integers(1, 5), max_size=5))
    cuts = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
    return every, [group for low, high in pairwise(cuts) if (group := order[low:high])]


@given(grouped(), st.integers(1, 4), st.data())
def test_lanes_hold_each_group_in_one_piece(
    work: tuple[list[LoaderTensor], list[list[int]]], threads: int, data: st.DataObject
) -> None:
    every, groups = work
    left = [tensor for tensor in every if data.draw(st.integers(0, 9), label=str(tensor.number))]  # one in ten is known
    numbers = {tensor.number for tensor in left}
    cut = lanes(units(arranged(left, groups)), threads, APART)
    placed = [[tensor.number for unit in lane for tensor in unit.tensors] for lane in cut]
    assert sorted(number for lane in placed for number in lane) == sorted(numbers)
    whole = [group for group in groups if numbers.issuperset(group)]
    for group in whole:
        assert any(lane[at : at + len(group)] == group for lane in placed for at in range(len(lane)))
    kept = [batch[0].group for lane in cut for batch in batches(lane) if batch[0].group is not None]
    assert sorted(kept) == sorted(group[0] for group in whole), "each group is one batch"
    assert len(cut) <= most_lanes(arranged(every, groups), threads, APART)
    grouped = {number for group in whole for number in group}
    rest = [number for lane in placed for number in lane if number not in grouped]
    assert rest == sorted(rest), "what is in no group stays in the order of files"


def test_a_group_is_placed_where_its_first_tensor_is() -> None:
    every = tensors([5, 6, 7], [8, 9])
    found = arranged(every, [[4, 0], [3, 1, 2], [9]])
    assert [(tensor.number, tensor.group) for tensor in found] == [(3, 3), (1, 3), (2, 3), (4, 4), (0, 4)]
    assert [len(lane) for lane in lanes(units(found), 4, APART)] == [4], "1 and 2 are neighbours, and one unit"
    known = [tensor for tensor in every if tensor.number != 1]
    assert [(t.number, t.group) for t in arranged(known, [[3, 1, 2], [4, 0]])] == [
        (2, None), (3, None), (4, 4), (0, 4),
    ]  # fmt: skip


def test_what_is_grouped_in_another_file_may_make_one_more_lane_there() -> None:
    every = tensors([31 * MIB, MIB, MIB], [33 * MIB, *[64 * MIB] * 4])
    found = arranged(every, [[1, 3]])
    assert [len(lane) for lane in lanes(units(found), 4, APART)] == [3, 1, 1, 1, 1, 1]
    assert most_lanes(every, 4, APART) == 5
    assert most_lanes(found, 4, APART) == 6


def test_lanes_are_as_even_as_groups_allow() -> None:
    """Pairs from both ends of a file of 64 × 8 MiB: four lanes of 16 still."""
    every = tensors([8 * MIB] * 64)
    cut = lanes(units(arranged(every, [[at, 63 - at] for at in range(32)])), 4, APART)
    assert [len(lane) for lane in cut] == [16, 16, 16, 16]


def test_a_long_file_has_a_lane_for_each_thread_and_a_short_one_has_one() -> None:
    long, short = [8 * MIB] * 64, [MIB] * 3
    cut = lanes(units(tensors(long, short)), 4, APART)
    assert [len(lane) for lane in cut] == [16, 16, 16, 16, 3]


def test_neighbours_that_fit_into_a_piece_are_one_unit() -> None:
    assert [len(unit.tensors) for unit in units(tensors([1000, 2000, PIECE, 5, 6]))] == [2, 1, 2]


def test_each_unit_is_done_once_and_threads_stay_on_their_lanes() -> None:
    work = lanes(units(tensors([8 * MIB] * 64)), 2, APART)
    together = threading.Barrier(2)
    done: dict[int, list[LoaderUnit]] = {}

    def step(unit: LoaderUnit) -> None:
        done.setdefault(threading.get_ident(), []).append(unit)
        together.wait(60)  # both threads go at the same speed

    on_threads(rows(work, 2), step)
    assert sorted(done.values(), key=lambda units: units[0].start) == work


def test_an_idle_thread_helps_with_the_longest_lane() -> None:
    (lane,) = lanes(units(tensors([2 * MIB] * 4)), 2, APART)
    together = threading.Barrier(2)
    on_threads(rows([lane], 2), lambda _: together.wait(60) and None)  # with one thread this would break


def test_the_units_of_a_lane_begin_in_their_order_whoever_works_them_off() -> None:
    (lane,) = lanes(units(tensors([2 * MIB] * 200)), 1, APART)
    begun: list[int] = []
    done: list[int] = []

    def step(unit: LoaderUnit) -> None:
        assert unit.start in begun
        done.append(unit.start)

    on_threads(rows([lane], 4), step, lambda unit: begun.append(unit.start))
    assert begun == [unit.start for unit in lane]
    assert sorted(done) == begun


def test_an_error_at_the_beginning_of_a_unit_stops_all() -> None:
    def begin(unit: LoaderUnit) -> None:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        on_threads(rows(lanes(units(tensors([2 * MIB] * 100)), 1, APART), 4), lambda _: None, begin)


def test_the_first_error_stops_all() -> None:
    def step(unit: LoaderUnit) -> None:
        raise ValueError(str(unit.start))

    with pytest.raises(ValueError, match="0"):
        on_threads(rows(lanes(units(tensors([2 * MIB] * 100)), 1, APART), 1), step)


# -- what groups must not change, and what comes again ---------------------------------------------------------------


@given(grouped(), grouped(), st.integers(1, 4))
def test_groups_that_are_asked_for_make_no_more_lanes(
    work: tuple[list[LoaderTensor], list[list[int]]], other: tuple[list[LoaderTensor], list[list[int]]], threads: int
) -> None:
    every, wanted = work
    usual = [group for group in other[1] if all(number < len(every) for number in group)]
    count = lanes_in_file(every, wanted, usual, threads, APART)
    runs = most_lanes(arranged(every, usual), threads, APART)
    assert 1 <= count <= threads
    assert most_lanes(arranged(every, wanted), count, APART) <= runs
    assert len(lanes(units(arranged(every, wanted)), count, APART)) <= runs
    assert lanes_in_file(every, usual, usual, threads, APART) == threads


def test_what_comes_again_is_dealt_with_later() -> None:
    every = tensors([MIB, 100, MIB, MIB, 100, MIB])
    work = lanes(units(every), 1, APART)
    digests = {
        tensor.number: digest for tensor, digest in zip(every, (b"a", b"s", b"b", b"a", b"s", b"a"), strict=True)
    }
    again = repeated(work, digests)
    assert again == {3, 5}, "small tensors have blobs of their own"
    first, later = ([t.number for lane in part for unit in lane for t in unit.tensors] for part in parted(work, again))
    assert first == [0, 1, 2, 4]
    assert later == [3, 5]
    assert repeated(work, {**digests, 5: b"c"}) == {3}


def test_a_thread_whose_help_comes_too_late_helps_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has chosen the longest row, of which nothing is left by the time that it may take from it."""
    idle, short, long = [], [*units(tensors([PIECE]))], [*units(tensors([PIECE] * 2))]
    chosen, helped = threading.Event(), threading.Event()
    helpers: list[str] = []

    class Row(schedule._Share):
        """A row whose own thread is as slow as it takes."""

        def __init__(self, work: Iterable[LoaderUnit]) -> None:
            super().__init__(work)
            self._length = len(self.units)
            self.taking = self  # type: ignore[assignment]  # a lock
            self._lock = threading.Lock()

        def __enter__(self) -> None:
            thread = threading.current_thread().name
            if self._length == 2 and thread == "reader-0":
                chosen.set()
                eventually(lambda: not self.units, what="the row to be worked off")
            elif self._length == 2:
                assert chosen.wait(60)
            elif thread != "reader-0":
                assert helped.wait(60)
            self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    def step(unit: LoaderUnit) -> None:
        if unit in short:
            helpers.append(threading.current_thread().name)
            helped.set()

    short = [unit._replace(file=1) for unit in short]
    monkeypatch.setattr(schedule, "_Share", Row)
    on_threads([idle, short, long], step)
    assert helpers == ["reader-0"]
