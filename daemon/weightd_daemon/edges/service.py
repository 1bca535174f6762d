"""The gRPC services: decode, ask the books, encode."""

from __future__ import annotations

import asyncio
import os

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weightd._proto.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    daemon_pb2,
    daemon_pb2_grpc,
    lease_pb2,
    lease_pb2_grpc,
)
from weightd_daemon import __version__

from .checkpoint_service import CheckpointService
from .interceptors import Context, ErrorMapping
from .parts import Parts
from .show import time_to, user_name

MAX_MESSAGE = 64 << 20
_SERVICES = tuple(
    proto.DESCRIPTOR.services_by_name[name].full_name
    for proto, name in (
        (checkpoint_pb2, "CheckpointService"),
        (lease_pb2, "LeaseService"),
        (daemon_pb2, "DaemonService"),
    )
)


class LeaseService(lease_pb2_grpc.LeaseServiceServicer):
    """Lists leases."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def List(  # noqa: N802
        self, request: lease_pb2.ListLeasesRequest, context: Context
    ) -> lease_pb2.ListLeasesResponse:
        """The leases that are held now, of checkpoints that the caller may see."""
        parts = self._parts
        _, who = parts.caller(context)
        visible = {checkpoint.key: checkpoint for checkpoint in parts.catalog.visible(who)}
        leases = []
        for lease in parts.store.leases.refresh():
            checkpoint = visible.get(lease.checkpoint)  # type: ignore[call-overload]  # Hashable to the books
            if checkpoint is None:
                continue
            holder = lease.holder
            leases.append(
                lease_pb2.Lease(
                    lease=lease.number,
                    pid=holder.pid,
                    uid=holder.uid or 0,
                    user=user_name(holder.uid),
                    command=holder.command,
                    checkpoint=(parts.catalog.names(checkpoint) or [checkpoint.key.content_digest])[0],
                    device=checkpoint.key.device,
                    bytes=checkpoint.total_bytes,
                    since_time=time_to(lease.since),
                    waiting=lease.waiting,
                )
            )
        return lease_pb2.ListLeasesResponse(leases=leases)


class DaemonService(daemon_pb2_grpc.DaemonServiceServicer):
    """Version and books."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def GetVersion(  # noqa: N802
        self, request: daemon_pb2.GetVersionRequest, context: Context
    ) -> daemon_pb2.GetVersionResponse:
        """Needs no token, so that anybody who reaches the socket can ask."""
        uptime = self._parts.now() - self._parts.started
        return daemon_pb2.GetVersionResponse(version=__version__, pid=os.getpid(), uptime_seconds=uptime)

    async def GetStats(  # noqa: N802
        self, request: daemon_pb2.GetStatsRequest, context: Context
    ) -> daemon_pb2.GetStatsResponse:
        """The books of every device at one moment."""
        parts = self._parts
        parts.caller(context)
        store = parts.store
        devices = []
        for uuid, memory in store.memories.items():
            used, live, in_flight = memory.used, store.live_bytes(uuid), store.in_flight_bytes(uuid)
            device = parts.devices[uuid]
            devices.append(
                daemon_pb2.Device(
                    uuid=uuid,
                    kind=device.kind,
                    name=device.name,
                    budget_bytes=memory.budget,
                    used_bytes=used,
                    live_bytes=live,
                    in_flight_bytes=in_flight,
                    reusable_bytes=used - live - in_flight,
                    free_bytes=memory.budget - used,
                    segments=memory.segments,
                    device_free_bytes=device.available(),
                )
            )
        logical = sum(checkpoint.total_bytes for checkpoint in store.checkpoints.values())
        resident = sum(device.live_bytes for device in devices)
        return daemon_pb2.GetStatsResponse(
            devices=devices,
            logical_bytes=logical,
            resident_bytes=resident,
            saved_bytes=logical - resident,
            saved_ratio=(logical - resident) / logical if logical else 0.0,
            checkpoints=len(store.checkpoints),
            blobs=len(store.blobs()),
            leases=len(store.leases.refresh()),
            digest_collisions=store.collisions,
            evictions=store.evictions,
        )


class ControlPlane:
    """The gRPC server with its services, health and reflection."""

    def __init__(self, parts: Parts) -> None:
        options = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
        self._server = grpc.aio.server(interceptors=[ErrorMapping()], options=options)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # public, but not in its types
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server(CheckpointService(parts), self._server)
        lease_pb2_grpc.add_LeaseServiceServicer_to_server(LeaseService(parts), self._server)
        daemon_pb2_grpc.add_DaemonServiceServicer_to_server(DaemonService(parts), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._server
        )

    async def start(self, path: str) -> None:
        """Bind to a Unix socket whose place must be free."""
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.add_insecure_port(f"unix:{path}")
        await self._server.start()

    async def ready(self) -> None:
        """Everything is up: say so to whoever asks for health."""
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float) -> None:
        """Tell watchers of health, refuse new calls, give those under way `grace` seconds, then end."""
        await self._health.enter_graceful_shutdown()
        await asyncio.shield(self._server.stop(grace))
