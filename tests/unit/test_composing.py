"""Compositions over books in this process: what keeps their sources, and what is left of one that fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import gguf
import pytest

from support.filled import BLOBS, WHO, Filled
from weightd._dtypes import GGML_BLOCKS, tensor_bytes
from weightd._manifest import DTYPES
from weightd._proto.v1 import composition_pb2, handles_pb2
from weightd.composing import ComposedTensor, TensorSource, compose_request
from weightd.errors import (
    CapacityError,
    DeviceError,
    DrainingError,
    InUseError,
    InvalidReferenceError,
    LeaseLostError,
    NotFoundError,
    PermissionDeniedError,
)
from weightd.types import CheckpointFile
from weightd_daemon.api import composition_service as composition_service_module
from weightd_daemon.api.composition_service import MAX_DIMENSIONS, tensors_from
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey, Content
from weightd_daemon.core.events import Event, LoadBegun, LoadEnded
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.principal import Principal
from weightd_daemon.handles.manifest_file import encode_manifest, make_manifest
from weightd_daemon.loads.fair_queue import LoadQueue
from weightd_daemon.loads.flight import InFlightLoad
from weightd_daemon.loads.loads import MAX_COMPOSITIONS, Loads
from weightd_daemon.loads.request import ComposedTensors, LoadComposition, LoadRequest
from weightd_daemon.loads.waiting import happens

DEVICE = "GPU-0"
SOURCES = 2
PEER = LeasePeer(7, 1, 1000, "")


class Draft:
    size = 100

    def discard(self) -> None:
        pass


class Desk:
    """Loads over a device with two checkpoints, which compose a third one up to a gate before its seal."""

    def __init__(self, limits: UserLimits | None = None) -> None:
        limits = limits or UserLimits()
        self.books = Filled(0, held=False, limits=limits)
        for number in range(SOURCES):
            self.books.add(DEVICE, number)
        self.store = self.books.store
        self.sources = list(self.store.checkpoints.values())
        self.told: list[Event] = []
        self.at_gate, self.gate = asyncio.Event(), asyncio.Event()
        unused = cast("Any", None)
        self.loads = Loads(
            store=self.store, catalog=self.books.catalog, devices={**self.books.devices}, reclaimers={}, index=unused,
            prepare=self.prepare, now=lambda: 0.0, on_event=self.told.append, open_manifest=self.manifest, lock=-1,
            threads=1, fair_queue=LoadQueue(1, 1), limits=limits,
        )  # fmt: skip
        self.wish = LoadRequest(who=WHO, peer=PEER, sources=(), device=DEVICE, name="new", pin=True)

    async def prepare(self, _content: Content, _device: str) -> Draft:
        self.at_gate.set()
        await self.gate.wait()
        return Draft()

    def manifest(self, key: CheckpointKey) -> int:
        checkpoint = self.store.checkpoints[key]
        entries = tuple(ContentTensor("", f"t{at}", "U8", (4096,), 0, 4096) for at in range(BLOBS))
        files, blobs = (ContentFile("", "f", None),), tuple(checkpoint.unique.values())
        content = Content(key.content_digest, files, entries, blobs)
        return make_manifest(encode_manifest(content, key.device, "cuda_vmm", lambda _: 1 << 20))

    def compose(self, wish: LoadRequest | None = None) -> tuple[InFlightLoad, int]:
        """A checkpoint of the first tensor of each source."""
        entries = [ContentTensor("", f"w{at}", "U8", (4096,), 0, 4096) for at in range(SOURCES)]
        wanted = ComposedTensors([ContentFile("", "f", None)], entries, range(SOURCES), ["t0"] * SOURCES)
        sources = tuple((checkpoint.key.content_digest, "") for checkpoint in self.sources)
        return self.loads.compose(wish or self.wish, LoadComposition(sources, lambda: wanted))

    @asynccontextmanager
    async def composing(self, wish: LoadRequest | None = None) -> AsyncIterator[tuple[InFlightLoad, int]]:
        """A composition that has come to the gate, which is opened at the end."""
        load, waiter = self.compose(wish)
        assert await happens(self.at_gate, load.done), load.done.exception()
        yield load, waiter
        self.gate.set()
        await self.all_over()

    async def all_over(self) -> None:
        """Wait until no composition is under way, and all have cleaned up."""
        while self.loads._all or self.store.open_loads:  # noqa: ASYNC110  # nothing in the daemon waits for that
            await asyncio.sleep(0)

    def check_nothing_is_left(self) -> None:
        assert self.loads.under_way == []
        assert set(self.store.checkpoints.values()) <= set(self.sources)
        assert not len(self.store.leases)
        assert not self.store.open_loads
        assert self.store.books.coming == 0
        assert self.books.catalog.tag("", "new") is None
        assert [blob.holds for checkpoint in self.sources for blob in checkpoint.unique.values()] == [0] * len(
            [blob for checkpoint in self.sources for blob in checkpoint.unique]
        )
        begun = [event.load for event in self.told if isinstance(event, LoadBegun)]
        assert sorted(event.begun.load for event in self.told if isinstance(event, LoadEnded)) == begun


def running(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs on a loop."""

    def run(**arguments: object) -> None:
        asyncio.run(test(**arguments))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def evictable(desk: Desk) -> list[Checkpoint]:
    return list(desk.store.evictable())


@running
async def test_sources_stay_until_the_seal_and_may_go_then() -> None:
    """Whatever their connection does meanwhile: it attaches a source, or it ends."""
    desk = Desk()
    wish = replace(desk.wish, detached=True)
    async with desk.composing(wish) as (load, _):
        assert evictable(desk) == []
        with pytest.raises(InUseError, match="pid 1"):
            desk.store.remove(desk.sources[0])
        assert desk.store.leases.waiting_of(PEER.connection) == []
        desk.loads.disconnected(PEER.connection)
    checkpoint, outcome = load.done.result()
    assert (outcome.unique_bytes, outcome.total_bytes) == (0, SOURCES * 4096)
    assert evictable(desk) == desk.sources
    for source in desk.sources:
        desk.store.remove(source)
    assert desk.store.live_bytes(DEVICE) == outcome.total_bytes
    assert (checkpoint.pinned, desk.books.catalog.names(checkpoint)) == (True, ["new"])


@running
async def test_it_waits_for_its_caller_and_what_was_loaded_for_it_does_not() -> None:
    desk = Desk()
    for source in desk.sources:
        desk.store.leases.begin(source.key, PEER, 0.0, waiting=True)
    async with desk.composing() as (load, _):
        assert len(desk.store.leases.waiting_of(PEER.connection)) == SOURCES
    checkpoint, _ = load.done.result()
    assert [lease.checkpoint for lease in desk.store.leases.waiting_of(PEER.connection)] == [checkpoint.key]


@running
async def test_nothing_is_left_of_one_whose_caller_leaves() -> None:
    desk = Desk()
    async with desk.composing() as (load, waiter):
        desk.loads.leave(load, waiter)
    with pytest.raises(LeaseLostError):
        load.done.result()
    desk.check_nothing_is_left()
    assert [event.reason for event in desk.told if isinstance(event, LoadEnded)] == ["CANCELLED"]


@running
async def test_nothing_is_left_of_one_that_ends_in_the_step_in_which_it_began() -> None:
    desk = Desk()
    load, waiter = desk.compose()
    assert len(desk.store.leases) == SOURCES
    desk.loads.leave(load, waiter)
    await desk.all_over()
    desk.check_nothing_is_left()


@running
async def test_one_whose_caller_has_left_has_its_turn_until_its_thread_ends() -> None:
    """Nobody can end a thread: who composes and leaves again and again would take all that the daemon has."""
    desk, begun, may_end = Desk(), [0], threading.Event()

    def read() -> ComposedTensors:
        begun[0] += 1
        may_end.wait()
        raise InvalidReferenceError("read to its end")

    sources = tuple((checkpoint.key.content_digest, "") for checkpoint in desk.sources)
    try:
        for _ in range(3):
            load, waiter = desk.loads.compose(desk.wish, LoadComposition(sources, read))
            async with asyncio.timeout(60):
                while not begun[0]:  # noqa: ASYNC110  # the thread tells nobody
                    await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0.001)
            desk.loads.leave(load, waiter)
            with pytest.raises(LeaseLostError):
                await load.done
        assert begun == [1]
    finally:
        may_end.set()
    await desk.all_over()
    desk.check_nothing_is_left()


@running
async def test_nothing_is_left_of_one_whose_device_loses_its_memory() -> None:
    desk = Desk()
    async with desk.composing() as (load, _):
        desk.store.lose(DEVICE, "it fell")
        desk.loads.lose(DEVICE, DeviceError("it fell"))
    with pytest.raises(DeviceError, match="it fell"):
        load.done.result()
    assert not desk.store.checkpoints
    assert not len(desk.store.leases)
    with pytest.raises(DeviceError, match="was lost: it fell"):
        desk.compose()


@running
async def test_a_name_that_another_has_taken_meanwhile_keeps_it_from_being_sealed() -> None:
    desk = Desk()
    bob = Principal(1001, admin=False, domain="")
    async with desk.composing() as (load, _):
        desk.books.catalog.set(bob, "new", desk.sources[0].key.content_digest)
    with pytest.raises(PermissionDeniedError, match="name 'new' belongs to uid 1001"):
        load.done.result()
    desk.books.catalog.remove(bob, "new")
    desk.check_nothing_is_left()


@running
async def test_a_limit_of_the_user_that_is_reached_meanwhile_keeps_it_from_being_sealed() -> None:
    limits = UserLimits()
    desk = Desk(limits)
    async with desk.composing() as (load, _):
        limits.bytes = 1
    with pytest.raises(CapacityError, match="max_user_bytes"):
        load.done.result()
    desk.check_nothing_is_left()


@running
async def test_books_that_have_no_room_refuse_it_before_its_manifest_is_made() -> None:
    desk = Desk()
    for source in desk.sources:
        desk.store.leases.begin(source.key, PEER, 0.0, waiting=True)
    desk.store.books.limit = desk.store.books.used + 1
    load, _ = desk.compose()
    await desk.all_over()
    with pytest.raises(CapacityError, match="the limit books is reached"):
        load.done.result()
    assert not desk.at_gate.is_set()


@running
async def test_a_source_that_is_not_there_and_leases_that_may_not_be_had() -> None:
    limits = UserLimits(leases=SOURCES - 1)
    desk = Desk(limits)
    with pytest.raises(CapacityError, match="max_user_leases"):
        desk.compose()
    limits.leases = 0
    desk.store.leases.draining = True
    with pytest.raises(DrainingError):
        desk.compose()
    desk.store.leases.draining = False
    desk.store.remove(desk.sources[1])
    with pytest.raises(NotFoundError, match="is not resident on GPU-0"):
        desk.compose()
    desk.check_nothing_is_left()


@running
async def test_a_user_has_so_many_under_way_and_another_one_its_own() -> None:
    desk = Desk()
    mine = [desk.compose(replace(desk.wish, name=f"n{at}")) for at in range(MAX_COMPOSITIONS)]
    with pytest.raises(InUseError, match="4 compositions under way"):
        desk.compose()
    desk.compose(replace(desk.wish, who=Principal(1001, admin=False, domain="")))
    assert desk.loads.untaken(1000) == 0, "none has an intake"
    desk.loads.leave(*mine[-1])
    desk.compose()
    await desk.loads.close()


def request(**columns: Any) -> composition_pb2.ComposeRequest:
    """A request for one tensor, with other columns."""
    usual: dict[str, Any] = {
        "sources": [composition_pb2.TensorSource(content_digest="sha256:0")],
        "files": [composition_pb2.ComposedFile(component="c", file="f")],
        "names": ["w"], "file_indices": [0], "dtypes": [handles_pb2.DTYPE_F32], "ranks": [2], "dimensions": [2, 3],
        "source_indices": [0],
    }  # fmt: skip
    return composition_pb2.ComposeRequest(**usual | columns)


def test_a_request_becomes_rows() -> None:
    assert tensors_from(request(renamed=[0], source_names=["there"])) == ComposedTensors(
        [ContentFile("c", "f", None)], [ContentTensor("c", "w", "F32", (2, 3), 0, 24)], [0], ["there"]
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"names": []}, "columns of different lengths"),
        ({"names": ["w", "v"]}, "columns of different lengths"),
        ({"dtypes": []}, "columns of different lengths"),
        ({"dimensions": [2]}, "columns of different lengths"),
        ({"source_indices": []}, "columns of different lengths"),
        ({"source_indices": [1]}, "a source that the request does not name"),
        ({"file_indices": [1]}, "a file that it does not name"),
        ({"dimensions": [-2, -3]}, "a shape that cannot be"),
        ({"ranks": [MAX_DIMENSIONS + 1], "dimensions": [1] * (MAX_DIMENSIONS + 1)}, "at most 64 dimensions"),
        ({"dimensions": [1 << 62, 3]}, "there is none of F32"),
        ({"dtypes": [0]}, "type number 0"),
        ({"dtypes": [1999]}, "type number 1999"),
        ({"renamed": [0]}, "renames a tensor that it does not have"),
        ({"renamed": [1], "source_names": ["v"]}, "renames a tensor that it does not have"),
        ({"files": [composition_pb2.ComposedFile(file="f")] * 2}, "named twice"),
        ({"files": [composition_pb2.ComposedFile(file="a\nb")]}, "no control characters"),
        ({"files": [composition_pb2.ComposedFile()]}, "must have 1 to"),
        ({"files": [composition_pb2.ComposedFile(file=str(at)) for at in range(10_001)]}, "10001 files"),
    ],
)
def test_a_request_that_cannot_be(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidReferenceError, match=message):
        tensors_from(request(**columns))


def test_a_request_of_too_many_tensors_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition_service_module, "MAX_TENSORS", 1)
    assert tensors_from(request()).names == ["w"]
    with pytest.raises(InvalidReferenceError, match="2 tensors; a composition may have 1"):
        tensors_from(request(names=["w", "v"]))


def test_a_list_of_tensors_survives_the_way() -> None:
    """Names that are the same in the source are sent once, and each component of a source is named once."""
    files = [CheckpointFile("a", "one", {"key": "value"}), CheckpointFile("b", "two", {}), CheckpointFile("", "three")]
    tensors = [
        ComposedTensor(0, "x", "BF16", (2, 2), TensorSource("sha256:1", "", "x")),
        ComposedTensor(1, "y", "GGML_Q8_0", (32,), TensorSource("sha256:2", "b", "z")),
        ComposedTensor(1, "x", "U8", (), TensorSource("sha256:1", "", "x")),
        ComposedTensor(2, "none", "F32", (0, 3)),
    ]
    sent = compose_request(files, tensors)
    assert [(source.content_digest, source.component) for source in sent.sources] == [
        ("sha256:1", ""),
        ("sha256:2", "b"),
    ]
    assert list(sent.source_names) == ["z"]
    found = tensors_from(sent)
    assert found.files == [ContentFile(*file) for file in files]
    assert [(one.file, one.name, one.dtype, one.shape) for one in found.entries] == [one[:4] for one in tensors]
    assert [one.length for one in found.entries] == [8, 34, 1, 0]
    assert found.sources == [0, 1, 0, 0]
    assert found.names == ["x", "z", "x", "none"]


@pytest.mark.parametrize(
    "tensor",
    [
        ComposedTensor(0, "w", "F33", (1,)),
        ComposedTensor(-1, "w", "F32", (1,)),
        ComposedTensor(0, "w", "F32", (1 << 63,)),
        ComposedTensor(0, "\ud800", "F32", (1,)),
    ],
)
def test_a_tensor_that_the_protocol_does_not_have(tensor: ComposedTensor) -> None:
    with pytest.raises(InvalidReferenceError, match="cannot be of type"):
        compose_request([CheckpointFile("", "f")], [tensor])


def test_sizes_of_blocks_are_those_of_the_package_gguf() -> None:
    sizes = {f"GGML_{kind.name}": size for kind, size in gguf.GGML_QUANT_SIZES.items() if size[0] > 1}
    assert sizes == GGML_BLOCKS
    assert GGML_BLOCKS.keys() <= DTYPES.keys()


def test_sizes_of_tensors() -> None:
    assert [tensor_bytes("F32", (2, 3)), tensor_bytes("F64", ()), tensor_bytes("F4", (4,))] == [24, 8, 2]
    assert [tensor_bytes("GGML_Q4_K", (3, 512)), tensor_bytes("GGML_Q4_K", (0, 256))] == [864, 0]
    assert [tensor_bytes("F4", (3,)), tensor_bytes("GGML_Q4_K", (512, 3)), tensor_bytes("GGML_Q4_K", ())] == [None] * 3
    assert tensor_bytes("F33", (1,)) is None
