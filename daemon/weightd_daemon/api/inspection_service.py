"""InspectionService: what monitors ask. The answers are made in `inspection`."""

from __future__ import annotations

from weightd._proto.v1 import inspection_pb2, inspection_pb2_grpc
from weightd.errors import PermissionDeniedError
from weightd_daemon.devices.naming import meant, place
from weightd_daemon.inspection.books_check import BooksCheck
from weightd_daemon.inspection.loads_under_way import list_loads
from weightd_daemon.inspection.running_settings import list_settings
from weightd_daemon.inspection.segment_map import SegmentMaps
from weightd_daemon.inspection.sharing_list import SharingList
from weightd_daemon.inspection.stored_tensors import StoredTensors

from .context import GrpcServiceContext
from .error_mapping import Context


class InspectionService(inspection_pb2_grpc.InspectionServiceServicer):
    """gRPC service that shows maps, sharing, tensors, loads and settings, and changes nothing."""

    def __init__(self, parts: GrpcServiceContext) -> None:
        self._parts = parts
        self._sharing = SharingList(parts.store, parts.catalog, parts.sharing)
        self._tensors = StoredTensors(parts.store, parts.catalog, parts.manifests, parts.sharing)
        self._books = BooksCheck(parts.store, parts.devices, parts.locks)
        self._maps = SegmentMaps(parts.store, parts.catalog, parts.sharing)

    async def GetMap(  # noqa: N802  # named by the proto
        self, request: inspection_pb2.GetMapRequest, context: Context
    ) -> inspection_pb2.GetMapResponse:
        """A page of the map of a device."""
        parts = self._parts
        _, who = parts.caller(context)
        return await self._maps.page(who, request, place(parts.devices, parts.default_device, request.device))

    async def ListSharing(  # noqa: N802
        self, request: inspection_pb2.ListSharingRequest, context: Context
    ) -> inspection_pb2.ListSharingResponse:
        """A page of the pairs that share."""
        _, who = self._parts.caller(context)
        return await self._sharing.page(who, request, meant(self._parts.devices, request.device))

    async def ListTensors(  # noqa: N802
        self, request: inspection_pb2.ListTensorsRequest, context: Context
    ) -> inspection_pb2.ListTensorsResponse:
        """A page of the tensors of a checkpoint."""
        _, who = self._parts.caller(context)
        return await self._tensors.page(who, request, meant(self._parts.devices, request.device))

    async def ListLoads(  # noqa: N802
        self, request: inspection_pb2.ListLoadsRequest, context: Context
    ) -> inspection_pb2.ListLoadsResponse:
        """The loads under way that the caller may see."""
        _, who = self._parts.caller(context)
        return await list_loads(self._parts.loads, who)

    async def GetSettings(  # noqa: N802
        self, request: inspection_pb2.GetSettingsRequest, context: Context
    ) -> inspection_pb2.GetSettingsResponse:
        """The settings in force, for every user."""
        self._parts.caller(context)
        return list_settings(self._parts.in_force, self._parts.store, self._parts.devices)

    async def CheckBooks(  # noqa: N802
        self, request: inspection_pb2.CheckBooksRequest, context: Context
    ) -> inspection_pb2.CheckBooksResponse:
        """The books against the kernel and the devices, for admins: figures are of all users together."""
        _, who = self._parts.caller(context)
        if not who.admin:
            raise PermissionDeniedError("only admins may check the books: the daemon's own user, root, and `admins`")
        return await self._books.check()
