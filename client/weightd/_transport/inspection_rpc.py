"""Calls of InspectionService, page by page, and their answers as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightd._proto.v1 import inspection_pb2
from weightd.inspection import (
    BlobUsers,
    BooksFigure,
    DeviceMap,
    LoadInfo,
    MapExtent,
    MapSegment,
    SettingInfo,
    SharedComponents,
    SharedPair,
    StoredTensor,
)

from .convert import progress_from, time_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from weightd._proto.v1 import inspection_pb2_grpc

_MOST_ROWS = 5000
"""Rows that a page may have."""
_ATTEMPTS = 3
"""How often a map is asked for that changes between its pages."""

_KINDS = {
    inspection_pb2.MapExtent.KIND_BLOBS: "blobs",
    inspection_pb2.MapExtent.KIND_HOLE: "hole",
    inspection_pb2.MapExtent.KIND_HOLLOW: "hollow",
    inspection_pb2.MapExtent.KIND_LEAVING: "leaving",
    inspection_pb2.MapExtent.KIND_IN_FLIGHT: "in_flight",
    inspection_pb2.MapExtent.KIND_SET_ASIDE: "set_aside",
    inspection_pb2.MapExtent.KIND_OTHERS: "others",
}


class InspectionRpc:
    """The part of the gRPC client that only looks. `call` calls a method with a request, and raises weightd's errors.

    `page_size` is rows of a page; 0 is as many as the daemon gives.
    """

    def __init__(
        self, stub: inspection_pb2_grpc.InspectionServiceStub, call: Callable[[Any, Any], Any], page_size: int = 0
    ) -> None:
        self._stub = stub
        self._call = call
        self._page_size = page_size

    def device_map(self, device: str) -> DeviceMap:
        """The map of a device; without a revision if it changed between pages each time."""
        request = inspection_pb2.GetMapRequest(device=device, page_size=self._page_size)
        pages: list[inspection_pb2.GetMapResponse] = []
        for _ in range(_ATTEMPTS):
            pages = list(self._pages(self._stub.GetMap, request))
            if len({page.revision for page in pages}) == 1:
                return _map_from(pages, pages[0].revision)
        return _map_from(pages, None)

    def sharing(self, reference: str, device: str, most: int | None = None) -> list[SharedPair]:
        """At most so many pairs that have bytes in common, each once: of one that moved the later figures."""
        rows = self._page_size if most is None else min(most, _MOST_ROWS)
        request = inspection_pb2.ListSharingRequest(reference=reference, device=device, page_size=rows)
        pairs: dict[tuple[str, str, str], SharedPair] = {}
        for page in self._pages(self._stub.ListSharing, request):
            for pair in map(_pair_reader(page.checkpoints), page.pairs):
                pairs[pair.device, pair.one, pair.other] = pair
            if most is not None and len(pairs) >= most:
                break
        return list(pairs.values())[:most]

    def tensors(self, reference: str, device: str) -> list[StoredTensor]:
        """The tensors of a checkpoint."""
        request = inspection_pb2.ListTensorsRequest(reference=reference, device=device, page_size=self._page_size)
        found: list[StoredTensor] = []
        for page in self._pages(self._stub.ListTensors, request):
            users = _users_from(page.users, page.checkpoints)
            found += [_tensor_from(tensor, users[tensor.users]) for tensor in page.tensors]
        return found

    def loads(self) -> list[LoadInfo]:
        """Loads under way."""
        response = self._call(self._stub.ListLoads, inspection_pb2.ListLoadsRequest())
        return [_load_from(load) for load in response.loads]

    def settings(self) -> tuple[list[SettingInfo], str]:
        """The settings in force, and the file that was read."""
        response = self._call(self._stub.GetSettings, inspection_pb2.GetSettingsRequest())
        return [SettingInfo(setting.key, setting.value, setting.origin) for setting in response.settings], response.file

    def check_books(self) -> list[BooksFigure]:
        """The books against the kernel and the devices."""
        response = self._call(self._stub.CheckBooks, inspection_pb2.CheckBooksRequest())
        return [
            BooksFigure(
                one.device, one.what, one.books, one.found if one.HasField("found") else None, one.source, one.agrees,
                one.in_bytes,
            )
            for one in response.figures
        ]  # fmt: skip

    def _pages(self, method: Any, request: Any) -> Iterator[Any]:
        """Every page. `request` is left as it was."""
        request = type(request).FromString(request.SerializeToString())
        while True:
            page = self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


def _map_from(pages: Iterable[inspection_pb2.GetMapResponse], revision: int | None) -> DeviceMap:
    device = ""
    segments: dict[int, MapSegment] = {}
    extents: list[MapExtent] = []
    names: dict[str, str] = {}
    for page in pages:
        device = page.device
        users = _users_from(page.users, page.checkpoints)
        names.update((one.content_digest, one.name) for one in page.checkpoints)
        segments.update((one.segment, MapSegment(one.segment, one.size_bytes)) for one in page.segments)
        extents += [_extent_from(extent, users) for extent in page.extents]
    return DeviceMap(device, revision, tuple(segments.values()), tuple(extents), names)


def _extent_from(message: inspection_pb2.MapExtent, users: list[BlobUsers]) -> MapExtent:
    kind = _KINDS.get(message.kind, "unknown")
    used_by = users[message.users] if kind == "blobs" else None
    place = message.segment, message.offset, message.length
    return MapExtent(*place, kind, blobs=message.blobs, users=used_by, load=message.load)


def _users_from(
    users: Iterable[inspection_pb2.BlobUsers], checkpoints: Iterable[inspection_pb2.CheckpointName]
) -> list[BlobUsers]:
    digests = [one.content_digest for one in checkpoints]
    return [BlobUsers(tuple(digests[index] for index in one.checkpoints), one.others) for one in users]


def _pair_reader(
    checkpoints: Iterable[inspection_pb2.CheckpointName],
) -> Callable[[inspection_pb2.SharedPair], SharedPair]:
    """What makes pairs of the messages of a page with these checkpoints."""
    called = [(one.content_digest, one.name) for one in checkpoints]

    def read(message: inspection_pb2.SharedPair) -> SharedPair:
        (one, one_name), (other, other_name) = called[message.one], called[message.other]
        components = tuple(SharedComponents(part.one, part.other, part.shared_bytes) for part in message.components)
        figures = message.shared_bytes, message.only_bytes
        return SharedPair(message.device, one, other, one_name, other_name, *figures, components)

    return read


def _tensor_from(message: inspection_pb2.Tensor, users: BlobUsers) -> StoredTensor:
    return StoredTensor(
        component=message.component, name=message.name, dtype=message.dtype, shape=tuple(message.shape),
        length=message.length, digest=message.digest, variant=message.variant, segment=message.segment,
        offset=message.offset, file=message.file, users=users,
    )  # fmt: skip


def _load_from(message: inspection_pb2.LoadUnderWay) -> LoadInfo:
    return LoadInfo(
        load=message.load,
        names=tuple(message.names),
        reference=message.reference,
        device=message.device,
        progress=progress_from(message.progress) if message.HasField("progress") else None,
        bytes_per_second=message.bytes_per_second,
        remaining_seconds=message.remaining_seconds if message.HasField("remaining_seconds") else None,
        begun_at=time_from(message.begin_time),
        pid=message.pid if message.HasField("pid") else None,
        uid=message.uid if message.HasField("uid") else None,
        user=message.user,
        command=message.command,
        waiters=message.waiters,
    )
