"""InspectionService: what monitors ask. The answers are made in `inspection`."""

from __future__ import annotations

from weightd._proto.v1 import inspection_pb2_grpc

from .context import GrpcServiceContext


class InspectionService(inspection_pb2_grpc.InspectionServiceServicer):
    """gRPC service that shows maps, sharing, tensors, loads and settings, and changes nothing."""

    def __init__(self, parts: GrpcServiceContext) -> None:
        self._parts = parts
