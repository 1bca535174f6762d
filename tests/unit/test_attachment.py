"""Attachments on host memory, made of a manifest and segments without a daemon: what is looked up, and what is read."""

from __future__ import annotations

import ctypes
import math
import os
import re
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

import weightd
from support.counting import operations
from weightd._manifest import DTYPES, Manifest
from weightd._mapping.ranges import MappedExtents, MappedRange
from weightd._proto.v1 import handles_pb2
from weightd._tensors import make_tensor, torch_dtype
from weightd._transport.handle_socket import ReceivedDescriptors
from weightd.types import DTYPE_BITS, TensorKey

if TYPE_CHECKING:
    import torch

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
    asked: list[object] = []
    rows, row = Manifest.rows, Manifest.row
    monkeypatch.setattr(Manifest, "rows", lambda self, which=None: (asked.append(which), rows(self, which))[1])
    monkeypatch.setattr(Manifest, "row", lambda self, number: (asked.append(number), row(self, number))[1])
    attachment = attach({"a": (0, 0), "b": (1, 256)}, sent=[])
    assert attachment.content_digest == "sha256:" + "0" * 64
    attachment.close()
    assert [key.name for key in attachment.tensors] == ["a", "b"]
    assert (len(attachment.tensors), ("", "b") in attachment.tensors, "b" in attachment.tensors) == (2, True, False)
    assert [key.name for key in reversed(attachment.tensors)] == ["b", "a"]
    assert list(reversed(attachment.tensors.keys())) == list(reversed(attachment.tensors))
    assert asked == []
    assert attachment.tensors["", "b"].segment == 1
    assert asked == [1]
    assert [info.name for info in attachment.tensors.values()] == ["a", "b"]
    assert asked == [1, None]
    assert dict(attachment.tensors.items()) == dict(attachment.tensors) == attachment.tensors


def test_tensors_are_made_without_rows_and_each_with_a_storage_of_its_own(
    attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the daemon's answer on. With a row and a view for each tensor it was 278 instructions a tensor."""
    for refused in ("row", "rows", "keys"):
        monkeypatch.setattr(Manifest, refused, None)
    attach({"t": (0, 0)}).state_dict()  # torch is imported
    nobody: Any = Nobody()
    costs = []
    for count in (1_000, 3_000):
        received = answer({f"t{number}": (number // 16, 256 * (number % 16)) for number in range(count)}, None)
        made: list[dict[str, torch.Tensor]] = []

        def whole(received: ReceivedDescriptors = received, made: list[dict[str, torch.Tensor]] = made) -> None:
            with weightd.Attachment(received, nobody) as attachment:
                made.append(attachment.state_dict())

        costs.append(operations(whole))
        (state,) = made
        assert list(state) == [f"t{number}" for number in range(count)]
        storages = [tensor.untyped_storage() for tensor in state.values()]
        assert {storage.nbytes() for storage in storages} == {256}
        assert len({storage.data_ptr() for storage in storages}) == count
        assert not any(tensor._is_view() for tensor in state.values())
    assert costs[1] - costs[0] <= 2_000 * 150


@pytest.mark.parametrize("shape", [(), (256,), (2, 128), (0, 4), (0, 2**62, 8), (1, 1, 256, 1)])
@pytest.mark.parametrize("dtype", ["U8", "BF16", "F32"])
def test_a_tensor_has_the_shape_and_bytes_of_its_row(shape: tuple[int, ...], dtype: str) -> None:
    size = math.prod(shape) * DTYPE_BITS[dtype] // 8
    memory = memoryview(bytearray(os.urandom(size))) if size else None
    tensor = make_tensor(memory, "cpu", "t", dtype, shape)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, torch_dtype(dtype))
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == size
    assert bytes(tensor.untyped_storage()) == bytes(memory or b"")  # type: ignore[call-overload]  # torch's types lack it


@pytest.mark.parametrize("shape", [(), (255,), (257,), (2, 127), (0, 4)])
def test_bytes_that_are_not_those_of_the_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        weightd.WeightdError, match=re.escape(f"tensor 't' of 256 elements, which are not those of {list(shape)}")
    ):
        make_tensor(memoryview(bytearray(256)), "cpu", "t", "U8", shape)


def test_bytes_that_are_no_whole_elements_are_refused_by_name() -> None:
    with pytest.raises(weightd.WeightdError, match="tensor 't' of 3 bytes, which are no F32"):
        make_tensor(memoryview(bytearray(3)), "cpu", "t", "F32", (1,))
