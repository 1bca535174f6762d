"""Reading ahead: what the kernel is asked for, in which order, how far, and when it is not asked."""

from __future__ import annotations

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightd.types import TensorSpec
from weightd_daemon.loader import read_ahead
from weightd_daemon.loader.read_ahead import LoaderReadAhead
from weightd_daemon.loader.schedule import LoaderTensor, LoaderUnit, lanes, rows, units
from weightd_daemon.loader.source import LoaderSource

PIECE, STEP, WINDOW = 1, 4, 32


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "STEP", STEP)
    monkeypatch.setattr(read_ahead, "WINDOW", WINDOW)


class Disk:
    """A file of which only the first bytes are cached, and which notes what it was asked for."""

    def __init__(self, cached: int = 0) -> None:
        self.cached = cached
        self.asked: list[int] = []
        self.waited: list[int] = []

    def read_cached(self, buffer: memoryview, offset: int) -> int:
        return max(0, min(len(buffer), self.cached - offset))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.waited += range(offset, offset + len(buffer))

    def will_need(self, offset: int, length: int) -> None:
        self.asked += range(offset, offset + length)


def tensors_of(lengths: list[list[int]], without: frozenset[int] = frozenset()) -> list[LoaderTensor]:
    """Tensors of these lengths in files, numbered throughout, one behind the other."""
    found = []
    number = 0
    for file, of_file in enumerate(lengths):
        offset = 0
        for length in of_file:
            if number not in without:
                found.append(LoaderTensor(number, file, TensorSpec(f"t{number}", "U8", (length,), offset, length)))
            offset += length
            number += 1
    return found


def single(tensors: list[LoaderTensor]) -> list[LoaderUnit]:
    """A unit for each tensor: at these lengths all would be one."""
    return [LoaderUnit(tensor.file, (tensor,)) for tensor in tensors]


def read(reading: LoaderReadAhead, tensor: LoaderTensor) -> Iterator[int]:
    """Read a tensor in pieces. Yields the place of each piece in its file, before it is read."""
    for offset in range(0, tensor.spec.length, PIECE):
        yield tensor.spec.offset + offset
        reading.read_into(memoryview(bytearray(min(PIECE, tensor.spec.length - offset))), tensor, offset)


@pytest.mark.parametrize("lengths", [[[100]], [[3, 50, 1, 46]], [[10] * 10], [[40], [1], [59]], [[1]] * 100])
def test_what_follows_is_asked_for_once_in_order_before_it_is_read(lengths: list[list[int]]) -> None:
    disks = [Disk() for _ in lengths]
    tensors = tensors_of(lengths)
    reading = LoaderReadAhead(disks, [single(tensors)])  # type: ignore[arg-type]  # played
    done = 0
    for tensor in tensors:
        for _ in read(reading, tensor):
            ahead = sum(len(disk.asked) for disk in disks) - done
            assert ahead <= WINDOW
            if 0 < done < 100 - WINDOW:
                assert ahead > WINDOW - STEP - PIECE
            done += PIECE
    for disk, of_file in zip(disks, lengths, strict=True):
        assert disk.asked == disk.waited == list(range(sum(of_file)))


def test_what_is_cached_is_asked_for_only_behind_the_first_wait() -> None:
    disk = Disk(cached=25)
    (tensor,) = tensors_of([[60]])
    reading = LoaderReadAhead([disk], [single([tensor])])  # type: ignore[list-item]  # played
    for at in read(reading, tensor):
        assert bool(disk.asked) is (at > 25)
    assert disk.asked == list(range(25, 60))
    assert disk.waited == list(range(25, 60))


def test_what_is_all_cached_is_never_asked_for() -> None:
    disk = Disk(cached=60)
    tensors = tensors_of([[20, 20, 20]])
    reading = LoaderReadAhead([disk], [single(tensors)])  # type: ignore[list-item]  # played
    for tensor in tensors:
        list(read(reading, tensor))
    assert disk.asked == disk.waited == []


def test_what_is_not_to_be_read_is_not_asked_for() -> None:
    disk = Disk()
    tensors = tensors_of([[10, 10, 10, 10]], without=frozenset({1, 2}))
    reading = LoaderReadAhead([disk], [single(tensors)])  # type: ignore[list-item]  # played
    list(read(reading, tensors[0]))
    assert disk.asked == [*range(10), *range(30, 40)]


def test_what_is_in_no_row_is_read_alone() -> None:
    disk = Disk()
    (tensor,) = tensors_of([[60]])
    list(read(LoaderReadAhead([disk]), tensor))  # type: ignore[list-item]  # played
    assert disk.waited == list(range(60))
    assert disk.asked == []


def test_threads_that_help_each_other_ask_for_each_byte_at_most_once() -> None:
    disk = Disk()
    tensors = tensors_of([[7] * 200])
    reading = LoaderReadAhead([disk], [single(tensors)])  # type: ignore[list-item]  # played
    crew = [
        threading.Thread(target=lambda of: [list(read(reading, tensor)) for tensor in of], args=(tensors[first::4],))
        for first in range(4)
    ]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert max(Counter(disk.asked).values()) == 1
    assert sorted(disk.waited) == list(range(1400))


def test_rows_hold_each_unit_once_and_their_lanes_in_order() -> None:
    work = lanes(units(tensors_of([[40 << 20] * 8, [1 << 20] * 30])), 2, [0, 1])
    found = rows(work, 2)
    assert Counter(unit for row in found for unit in row) == Counter(unit for lane in work for unit in lane)
    for lane in work:
        (row,) = [row for row in found if lane[0] in row]
        at = row.index(lane[0])
        assert row[at : at + len(lane)] == lane


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_short_file_is_read_to_its_end_and_past_it_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        source = LoaderSource("m", file.fileno())
        source.will_need(5, 100)
        buffer = bytearray(20)
        assert source.read_cached(memoryview(buffer), 4) == 6
        assert buffer[:6] == b"456789"
        assert source.read_cached(memoryview(buffer), 10) == 0


def test_a_held_file_is_cached_and_needs_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        source = LoaderSource("m", file.fileno(), hold=100)
    buffer = bytearray(4)
    source.will_need(0, 10)
    assert source.read_cached(memoryview(buffer), 3) == 4
    assert buffer == b"3456"


@pytest.mark.parametrize(("filesystem", "flags", "asks"), [
    (0xEF53, 0, True), (0x6969, 0, True), (0x65735546, 0, False), (None, 0, False), (0xEF53, os.O_DIRECT, False),
])  # fmt: skip
def test_only_files_whose_reads_go_through_the_page_cache_are_asked_for(
    filesystem: int | None, flags: int, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    path.write_bytes(bytes(10))
    asked: list[object] = []
    monkeypatch.setattr("weightd_daemon.loader.source.filesystem_type", lambda _: filesystem)
    monkeypatch.setattr(fcntl, "fcntl", lambda *_: flags)  # a tmpfs may not be opened so
    monkeypatch.setattr(os, "posix_fadvise", lambda *advice: asked.append(advice))
    with path.open("rb") as file:
        LoaderSource("m", file.fileno()).will_need(2, 5)
    assert bool(asked) is asks


def test_what_another_thread_has_asked_for_meanwhile_is_not_asked_for_again() -> None:
    """Threads that help with a row ask for what follows where they are, and one of them comes first."""
    disk = Disk()
    (tensor,) = tensors_of([[100]])
    reading = LoaderReadAhead([disk], [single([tensor])])  # type: ignore[list-item]  # played
    row, _ = reading._places[0]

    class Asking:
        """A lock that another thread has had just before, which was further on."""

        def __enter__(self) -> None:
            row._asking = threading.Lock()
            row.reach(2 * STEP)

        def __exit__(self, *_: object) -> None:
            pass

    row._asking = Asking()  # type: ignore[assignment]  # a lock
    for position in range(100):
        row.reach(position)
    assert disk.asked == list(range(2 * STEP, 100))
