"""The work of a load: divides tensors into units for reader threads, and distributes the units among threads.

Writes to one memfd take turns on the lock of its inode: two threads fill one memfd at 3.0 GB/s, and two memfds at 5.2
(measured). So in host memory a long file is cut into *lanes*, one for each thread, and each lane gets segments of its
own. On a GPU nothing takes turns: there a file is one lane, which all threads work off from the front. Short files of
one component share a lane: many small shards would else be as many segments.

Tensors that frameworks fuse (weightd/layouts.py) are *grouped*: they follow each other in one lane, whatever files they
are in, so that they come to lie one behind the other.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from weightd_daemon.core.blob import OWN_COPY_BELOW
from weightd_daemon.devices.segment_io import PIECE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from weightd.types import TensorSpec

Groups = Sequence[Sequence[int]]
"""Numbers of tensors, in the order in which they are to lie."""

_LANE_BYTES = 64 << 20
"""A lane is at least this long, for a segment is a mapping and two descriptors."""


class LoaderTensor(NamedTuple):
    """A tensor for the loader to read: its number in the load, its file, its place there, its group's first number."""

    number: int
    file: int
    spec: TensorSpec
    group: int | None = None


class LoaderUnit(NamedTuple):
    """Work of a loader thread at a time: one tensor, or neighbours in one file that together fill at most a piece."""

    file: int
    tensors: tuple[LoaderTensor, ...]

    @property
    def start(self) -> int:
        return self.tensors[0].spec.offset

    @property
    def end(self) -> int:
        return self.tensors[-1].spec.offset + self.tensors[-1].spec.length

    @property
    def length(self) -> int:
        return sum(tensor.spec.length for tensor in self.tensors)

    @property
    def group(self) -> int | None:
        return self.tensors[0].group


def split(sizes: Sequence[int], numbers: Sequence[int]) -> list[Sequence[int]]:
    """Groups, of which the numbers came in one row: as many to each as its size says."""
    ends = itertools.accumulate(sizes)
    return [numbers[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def arranged(tensors: Sequence[LoaderTensor], groups: Iterable[Sequence[int]]) -> list[LoaderTensor]:
    """Tensors (sorted by file and offset) in the order in which they are to be placed.

    A group, given by its tensors' numbers, stands where its first tensor is. Not if one of them is not there: what is
    resident already wins over order.
    """
    there = {tensor.number: tensor for tensor in tensors}
    whole = {group[0]: group for group in groups if all(number in there for number in group)}
    grouped = {number for group in whole.values() for number in group}
    found: list[LoaderTensor] = []
    for tensor in tensors:
        if tensor.number in whole:
            found += [there[number]._replace(group=tensor.number) for number in whole[tensor.number]]
        elif tensor.number not in grouped:
            found.append(tensor)
    return found


def units(tensors: Iterable[LoaderTensor]) -> Iterator[LoaderUnit]:
    """Cut tensors (arranged, none empty) into units; the tensors of one are in one group, or in none."""
    group: list[LoaderTensor] = []
    size = 0
    for tensor in tensors:
        joins = (
            group
            and (group[-1].file, group[-1].group) == (tensor.file, tensor.group)
            and group[-1].spec.offset + group[-1].spec.length == tensor.spec.offset
            and size + tensor.spec.length <= PIECE
        )
        if not joins:
            if group:
                yield LoaderUnit(group[0].file, tuple(group))
            group, size = [], 0
        group.append(tensor)
        size += tensor.spec.length
    if group:
        yield LoaderUnit(group[0].file, tuple(group))


Lane = list[LoaderUnit]
"""Neighbours in one file or in short ones, and what is grouped with them, to be worked off by one thread."""


def batches(work: Iterable[LoaderUnit]) -> Iterator[list[LoaderUnit]]:
    """What stays in one piece: the units of a group, else each unit."""
    for group, there in itertools.groupby(work, key=lambda unit: unit.group):
        if group is None:
            yield from ([unit] for unit in there)
        else:
            yield list(there)


def homes(components: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """For each file the first of those that it shares lanes with: neighbours of one component, short all together."""
    found: list[int] = []
    filled = 0
    for file, (component, size) in enumerate(zip(components, sizes, strict=True)):
        joins = file > 0 and component == components[file - 1] and filled + size <= _LANE_BYTES
        filled = filled + size if joins else size
        found.append(found[-1] if joins else file)
    return found


def lanes(work: Iterable[LoaderUnit], most: int, home: Sequence[int]) -> list[Lane]:
    """Cut arranged units into lanes: each file with its neighbours (`homes`) and what is grouped there, into `most`
    equal ones, if long enough.
    """
    found: list[Lane] = []
    for _, there in itertools.groupby(batches(work), key=lambda batch: home[batch[0].file]):
        file = list(there)
        share = max(_LANE_BYTES, -(-sum(unit.length for batch in file for unit in batch) // most))
        position, last = 0, -1
        for batch in file:
            if position // share != last:
                last = position // share
                found.append([])
            found[-1] += batch
            position += sum(unit.length for unit in batch)
    return found


def repeated(work: Iterable[Lane], digests: Mapping[int, bytes]) -> frozenset[int]:
    """The tensors whose bytes, by their digests, an earlier one has, where both can have one blob."""
    seen: set[tuple[bytes, int]] = set()
    again: set[int] = set()
    for tensor in (tensor for lane in work for unit in lane for tensor in unit.tensors):
        content = digests[tensor.number], tensor.spec.length
        if tensor.spec.length >= OWN_COPY_BELOW:
            if content in seen:
                again.add(tensor.number)
            seen.add(content)
    return frozenset(again)


def parted(work: Sequence[Lane], later: frozenset[int]) -> tuple[list[Lane], list[Lane]]:
    """The work without the tensors that are to come `later`, and those."""

    def only(wanted: bool) -> list[Lane]:
        kept = [
            [unit._replace(tensors=tuple(t for t in unit.tensors if (t.number in later) is wanted)) for unit in lane]
            for lane in work
        ]
        return [[unit for unit in lane if unit.tensors] for lane in kept]

    return only(False), only(True)


def most_lanes(tensors: Iterable[LoaderTensor], most: int, home: Sequence[int]) -> int:
    """The most lanes that these arranged tensors, or any part of them, are cut into.

    A tensor that is grouped in another file counts in both: without all of its group it stays in its own.
    """
    sizes: dict[int, int] = {}
    first = 0
    for tensor in tensors:
        if tensor.group in (None, tensor.number):
            first = tensor.file
        for file in {home[first], home[tensor.file]}:
            sizes[file] = sizes.get(file, 0) + tensor.spec.length
    return sum(min(most, size // _LANE_BYTES + 1) for size in sizes.values())


def lanes_in_file(
    tensors: Sequence[LoaderTensor], wanted: Groups, usual: Groups, most: int, home: Sequence[int]
) -> int:
    """Into how many lanes a file is cut at most, so that `wanted` groups make no more lanes than `usual` ones would.

    A load is admitted by the number of its lanes, and groups that a client asks for must not change who is.
    """
    runs = most_lanes(arranged(tensors, usual), most, home)
    placed = arranged(tensors, wanted)
    # With one lane in each file there are as many as files, and fewer are never counted.
    return next((count for count in range(most, 1, -1) if most_lanes(placed, count, home) <= runs), 1)


def rows(work: Iterable[Lane], threads: int) -> list[list[LoaderUnit]]:
    """The units of each of several threads, in order: whole lanes, each to the thread that has least by then."""
    found: list[list[LoaderUnit]] = [[] for _ in range(threads)]
    sizes = [0] * threads
    for lane in work:
        least = sizes.index(min(sizes))
        found[least] += lane
        sizes[least] += sum(unit.length for unit in lane)
    return found


def on_threads(
    rows: Iterable[Iterable[LoaderUnit]],
    step: Callable[[LoaderUnit], None],
    begin: Callable[[LoaderUnit], None] = lambda _: None,
) -> None:
    """Work rows off, each on a thread; the first error stops all and is raised.

    `begin` is called for the units of a row one after the other, in their order; `step` on any thread after that.
    """
    shares = [_Share(row) for row in rows]
    errors: list[BaseException] = []

    def run(own: _Share) -> None:
        while not errors:
            share = own if own.units else max(shares, key=lambda share: len(share.units))  # helps whoever has most
            try:
                with share.taking:
                    if not share.units:
                        if not any(share.units for share in shares):
                            return
                        continue
                    unit = share.units.popleft()
                    begin(unit)
                step(unit)
            except BaseException as error:  # noqa: BLE001  # carried to the caller, which raises it
                errors.append(error)

    crew = [threading.Thread(target=run, args=(own,), name=f"reader-{number}") for number, own in enumerate(shares)]
    started = []
    for thread in crew:
        try:
            thread.start()
        except RuntimeError:  # no more threads (RLIMIT_NPROC, pids.max): those that run take over what others have
            break
        started.append(thread)
    if not started:
        run(shares[0])
    for thread in started:
        thread.join()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # it is in its own traceback's reach: that cycle would keep the step's buffers and maps


class _Share:
    """A thread's units, which others help with when they have none left."""

    def __init__(self, units: Iterable[LoaderUnit]) -> None:
        self.units = deque(units)
        self.taking = threading.Lock()
