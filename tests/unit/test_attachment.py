"""Attachments on host memory, made of a manifest and segments without a daemon: what is looked up, and what is read."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import weightd
from support.counting import operations
from weightd._manifest import DTYPES, Manifest
from weightd._mapping.ranges import MappedExtents, MappedRange
from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import ReceivedDescriptors
from weightd.types import TensorKey

PAGE = 4096
Attach = Callable[..., weightd.Attachment]
Places = dict[str, tuple[int, int]]
"""By name: segment and offset of 256 bytes."""


class Nobody:
    """A line to a daemon that is not there."""

    def hold(self, lease: int, content_digest: str, device: str, mapping: object) -> None:
        pass

    def detach(self, lease: int) -> bool:
        return True


def memfd(data: bytes) -> int:
    descriptor = os.memfd_create("t")
    os.write(descriptor, data)
    return descriptor


def answer(places: Places, sent: list[int] | None) -> ReceivedDescriptors:
    """The answer to an attach: with all segments, or those that are sent."""
    count, segments = len(places), 1 + max(segment for segment, _ in places.values())
    message = handles_pb2.Manifest(
        content_digest="sha256:" + "0" * 64, device="host", kind="host", components=[""],
        files=[handles_pb2.ManifestFile(file="f")], segment_bytes=[PAGE] * segments, names=list(places),
        file_indices=[0] * count, dtypes=[DTYPES["U8"]] * count, ranks=[1] * count, dimensions=[256] * count,
        segments=[segment for segment, _ in places.values()], offsets=[offset for _, offset in places.values()],
        lengths=[256] * count, digests=bytes(16 * count), variants=[0] * count,
    ).SerializeToString()  # fmt: skip
    numbers = list(range(segments)) if sent is None else sent
    reply = handles_pb2.AttachReply(lease=1, manifest_bytes=len(message), segments=numbers)
    handles: list[int | bytes] = [memfd(bytes([number % 256]) * PAGE) for number in numbers]
    manifest = memfd(message)
    return ReceivedDescriptors(reply, manifest, manifest, handles)  # without a lease file, the manifest has the lease


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Attach places in segments of a page each: all, or those of `names`."""
    made: list[weightd.Attachment] = []

    def of(places: Places, *names: str, sent: list[int] | None = None) -> weightd.Attachment:
        keys = frozenset(TensorKey("", name) for name in names)
        made.append(weightd.Attachment(answer(places, sent), Nobody(), keys=keys))  # type: ignore[arg-type]  # enough of one
        return made[-1]

    yield of
    for attachment in made:
        attachment.close()


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


# -- holds -------------------------------------------------------------------------------------------------------------


def test_what_is_attached_is_held_and_nothing_beside_it(attach: Attach) -> None:
    attachment = attach({"a": (0, 0), "b": (1, 256)})
    at = address(attachment.buffer("b"))
    assert attachment.holds(at, 256)
    assert attachment.holds(at - 256, PAGE)
    assert not attachment.holds(id(attachment), 1)
    for start, size, _ in attachment.ranges():
        assert attachment.holds(start, size)
    attachment.close()
    with pytest.raises(weightd.InvalidReferenceError, match="closed"):
        attachment.holds(at, 256)


def test_holds_costs_a_lookup_however_many_segments_there_are(attach: Attach) -> None:
    costs = []
    for count in (2, 300):
        attachment = attach({f"t{number}": (number, 0) for number in range(count)})
        at = address(attachment.buffer("t1"))
        assert attachment.holds(at, 256)
        costs.append(operations(lambda one=attachment, at=at: one.holds(at, 256)))
    assert costs[0] == costs[1]


def test_extents_hold_what_their_ranges_hold() -> None:
    owner = weakref.ref(Nobody)
    ranges = [
        MappedRange(start, size, owner)
        for start, size in [(900, 50), (100, 50), (150, 50), (110, 5), (100, 50), (300, 9)]
    ]
    extents = MappedExtents(ranges)
    held = {byte for start, size, _ in ranges for byte in range(start, start + size)}
    for start in range(90, 960):
        for length in (1, 2, 49, 50, 51, 100, 101):
            assert extents.hold(start, length) == (held >= set(range(start, start + length))), (start, length)
    assert not MappedExtents([]).hold(100, 1)


# -- a few of many -----------------------------------------------------------------------------------------------------


def test_a_name_that_shares_its_place_with_one_that_is_not_attached_needs_no_mapping_of_its_own(attach: Attach) -> None:
    places = {"first": (0, 0), "second": (0, 0), "third": (0, 0)}
    every = attach(places)
    assert len({address(every.buffer(name)) for name in places}) == 3
    assert len(every.ranges()) == 3
    one = attach(places, "third")
    assert [key.name for key in one.tensors] == ["third"]
    assert len(one.ranges()) == 1
    two = attach(places, "third", "second")
    assert [key.name for key in two.tensors] == ["second", "third"]
    assert len({address(two.buffer(name)) for name in ("second", "third")}) == 2
    with pytest.raises(weightd.NotFoundError, match="'first' is not attached"):
        one.buffer("first")


def test_one_of_many_costs_a_fraction_of_all(attach: Attach) -> None:
    """Counted, not timed, from the answer of the daemon to the bytes."""
    places = {f"t{number}": (number // 16, 256 * (number % 16)) for number in range(4_000)}
    received = [answer(places, None), answer(places, [249])]
    keys = frozenset({TensorKey("", "t3999")})
    nobody: Any = Nobody()
    made = []
    every = operations(lambda: made.append(weightd.Attachment(received[0], nobody)))
    one = operations(lambda: made.append(weightd.Attachment(received[1], nobody, keys=keys)))
    for attachment in made:
        assert attachment.buffer("t3999")[0] == 249
        attachment.close()
    assert one * 4 < every


def test_the_manifest_alone_makes_no_rows_before_they_are_asked_for(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Manifest._read
    asked: list[object] = []

    def noted(self: Manifest, rows: list[int] | None = None) -> list[weightd.types.TensorInfo]:
        asked.append(rows)
        return read(self, rows)

    monkeypatch.setattr(Manifest, "_read", noted)
    attachment = attach({"a": (0, 0), "b": (1, 256)}, sent=[])
    assert attachment.content_digest == "sha256:" + "0" * 64
    assert asked == []
    attachment.close()
    assert [key.name for key in attachment.tensors] == ["a", "b"]
    assert asked == [None]
