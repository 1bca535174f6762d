"""The gRPC services: decode, ask the books, encode."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from weightd._proto.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    daemon_pb2,
    daemon_pb2_grpc,
    lease_pb2,
    lease_pb2_grpc,
)
from weightd._wire import source_from, source_to
from weightd.errors import DigestMismatchError, InvalidReferenceError, NotFoundError
from weightd_daemon import __version__
from weightd_daemon.loader.channel import error_from
from weightd_daemon.loader.request import LoadRequest, Outcome

from .interceptors import Context, ErrorMapping
from .show import time_to, user_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from weightd_daemon.core.catalog import Catalog, Who
    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.store import Store
    from weightd_daemon.devices.device import Device
    from weightd_daemon.loader.loads import Load, Loads

    from .connections import Connection, Connections

TOKEN = "weightd-token"  # noqa: S105  # the metadata key, not a secret
MAX_MESSAGE = 64 << 20
_SERVICES = tuple(
    proto.DESCRIPTOR.services_by_name[name].full_name
    for proto, name in (
        (checkpoint_pb2, "CheckpointService"),
        (lease_pb2, "LeaseService"),
        (daemon_pb2, "DaemonService"),
    )
)


class Parts(NamedTuple):
    """What the services answer from."""

    store: Store
    catalog: Catalog
    loads: Loads
    connections: Connections
    devices: dict[str, Device]
    default_device: str
    now: Callable[[], float]
    started: float

    def caller(self, context: Context) -> tuple[Connection, Who]:
        """Whose call it is. Errors: PermissionDeniedError."""
        metadata = {key: value for key, value in context.invocation_metadata() or ()}
        connection = self.connections.by_token(str(metadata.get(TOKEN, "")))
        return connection, self.connections.who(connection)


class CheckpointService(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """Loads, names, lists and removes checkpoints."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def Load(  # noqa: N802  # named by the proto
        self, request: checkpoint_pb2.LoadRequest, context: Context
    ) -> AsyncIterator[checkpoint_pb2.LoadEvent]:
        """Answer at once when the files' checkpoint is resident; otherwise load, or join the load under way."""
        parts = self._parts
        connection, who = parts.caller(context)
        wish = self._wish(connection, who, request)
        if wish.name and not wish.name_is_default:
            parts.catalog.check(who, wish.name)
        intake = connection.take_offer(request.offer_id)
        resident = parts.loads.find_resident(wish)
        if resident is not None:
            os.close(intake)
            name = parts.loads.settle(wish, resident)
            parts.loads.keep(wish, resident)
            outcome = Outcome(resident.key.content_digest, resident.tensor_count, resident.total_bytes, 0, 0, 0.0)
            yield _result(name, outcome, wish.device)
            return
        load, waiter, feeds = parts.loads.start(wish, intake)
        try:
            if feeds:
                yield checkpoint_pb2.LoadEvent(feed=checkpoint_pb2.LoadFeed())
            async for progress in load.events():
                phase = checkpoint_pb2.LoadProgress.Phase.Value(f"PHASE_{progress.phase.upper()}")
                report = checkpoint_pb2.LoadProgress(phase=phase, done_bytes=progress.done, total_bytes=progress.total)
                yield checkpoint_pb2.LoadEvent(progress=report)
            checkpoint, outcome = load.done.result()
            yield _result(parts.loads.settle(wish, checkpoint), outcome, wish.device)
        finally:
            parts.loads.leave(load, waiter)

    async def List(  # noqa: N802
        self, request: checkpoint_pb2.ListCheckpointsRequest, context: Context
    ) -> checkpoint_pb2.ListCheckpointsResponse:
        """Everything resident that the caller may see, then the loads under way."""
        _, who = self._parts.caller(context)
        there = [self._checkpoint(checkpoint) for checkpoint in self._parts.catalog.visible(who)]
        there.sort(key=lambda checkpoint: (not checkpoint.names, list(checkpoint.names), checkpoint.content_digest))
        under_way = [
            self._loading(load)
            for load in self._parts.loads.under_way
            if who.admin or load.request.who.domain == who.domain
        ]
        return checkpoint_pb2.ListCheckpointsResponse(checkpoints=there + under_way)

    async def Get(  # noqa: N802
        self, request: checkpoint_pb2.GetCheckpointRequest, context: Context
    ) -> checkpoint_pb2.GetCheckpointResponse:
        """One checkpoint with its parts."""
        _, who = self._parts.caller(context)
        checkpoint = self._parts.catalog.find(who, request.reference, request.device)
        components = [
            checkpoint_pb2.Component(
                name=name,
                tensors=tensors,
                total_bytes=sum(blob.length for blob in checkpoint.components.get(name, ())),
                shared_bytes=sum(b.length for b in checkpoint.components.get(name, ()) if b.references > 1),
            )
            for name, tensors in sorted(checkpoint.tensors.items())
        ]
        return checkpoint_pb2.GetCheckpointResponse(
            checkpoint=self._checkpoint(checkpoint),
            components=components,
            segments=len(checkpoint.segments),
            sources=[source_to(source) for source in (checkpoint.sources or [()])[0]],
        )

    async def Pin(  # noqa: N802
        self, request: checkpoint_pb2.PinCheckpointRequest, context: Context
    ) -> checkpoint_pb2.PinCheckpointResponse:
        """Keep a checkpoint."""
        return checkpoint_pb2.PinCheckpointResponse(checkpoint=self._pin(request, context, pinned=True))

    async def Unpin(  # noqa: N802
        self, request: checkpoint_pb2.UnpinCheckpointRequest, context: Context
    ) -> checkpoint_pb2.UnpinCheckpointResponse:
        """Let a checkpoint be evicted again."""
        return checkpoint_pb2.UnpinCheckpointResponse(checkpoint=self._pin(request, context, pinned=False))

    async def Remove(  # noqa: N802
        self, request: checkpoint_pb2.RemoveCheckpointRequest, context: Context
    ) -> checkpoint_pb2.RemoveCheckpointResponse:
        """Drop a name, and with the last one the checkpoint."""
        _, who = self._parts.caller(context)
        freed = self._parts.catalog.remove(who, request.reference, request.device)
        return checkpoint_pb2.RemoveCheckpointResponse(freed_bytes=freed)

    async def Verify(  # noqa: N802
        self, request: checkpoint_pb2.VerifyCheckpointRequest, context: Context
    ) -> AsyncIterator[checkpoint_pb2.VerifyEvent]:
        """Hash blobs again, device by device, while waiting leases keep them in place."""
        parts = self._parts
        connection, who = parts.caller(context)
        if request.reference:
            chosen = [parts.catalog.find(who, request.reference, request.device)]
        else:
            chosen = [c for c in parts.catalog.visible(who) if not request.device or c.key.device == request.device]
        leases = [parts.store.leases.take(c.key, connection.holder, parts.now(), waiting=True) for c in chosen]
        try:
            blobs = {number: blob for checkpoint in chosen for number, blob in checkpoint.unique.items()}
            event = checkpoint_pb2.VerifyEvent(
                total_blobs=len(blobs), total_bytes=sum(blob.length for blob in blobs.values())
            )
            bad: list[int] = []
            for uuid, device in parts.devices.items():
                here = [blob for blob in blobs.values() if blob.key.device == uuid]
                rows = [(b.number, b.segment, b.offset, b.length, b.key.digest.hex()) for b in here]
                blobs_before, bytes_before = event.done_blobs, event.done_bytes
                async for message in parts.loads.verify(rows, device) if rows else _nothing():
                    if message["op"] == "failed":
                        raise error_from(message)
                    if message["op"] == "verified":
                        bad += message["bad"]
                    else:
                        event.done_blobs = blobs_before + message["done"]
                        event.done_bytes = bytes_before + message["done_bytes"]
                        yield event
                event.done_blobs = blobs_before + len(rows)
                event.done_bytes = bytes_before + sum(blob.length for blob in here)
            if bad:
                named = [c for c in chosen if any(number in c.unique for number in bad)]
                names = ", ".join((parts.catalog.names(c) or [c.key.content_digest[:19]])[0] for c in named[:5])
                raise DigestMismatchError(
                    f"{len(bad)} of {len(blobs)} blobs no longer match their digest, in {names}; remove and load again"
                )
            yield event
        finally:
            for lease in leases:
                parts.store.leases.end(lease.number)

    def _wish(self, connection: Connection, who: Who, request: checkpoint_pb2.LoadRequest) -> LoadRequest:
        device = request.device or self._parts.default_device
        if device not in self._parts.devices:
            raise NotFoundError(f"device {device!r}: this daemon serves {', '.join(self._parts.devices)}")
        if not request.sources:
            raise InvalidReferenceError("the load names no files")
        return LoadRequest(
            who=who,
            holder=connection.holder,
            sources=tuple(source_from(source) for source in request.sources),
            device=device,
            name=request.name,
            name_is_default=request.name_is_default,
            pin=request.pin,
            detached=request.detached,
            verify=request.verify,
        )

    def _pin(self, request: Any, context: Context, *, pinned: bool) -> checkpoint_pb2.Checkpoint:
        _, who = self._parts.caller(context)
        checkpoint = self._parts.catalog.find(who, request.reference, request.device)
        self._parts.catalog.check_owner(who, checkpoint, "pin" if pinned else "unpin", request.reference)
        checkpoint.pinned = pinned
        return self._checkpoint(checkpoint)

    def _checkpoint(self, checkpoint: Checkpoint) -> checkpoint_pb2.Checkpoint:
        parts = self._parts
        owner = parts.catalog.owner(checkpoint)
        return checkpoint_pb2.Checkpoint(
            names=parts.catalog.names(checkpoint),
            content_digest=checkpoint.key.content_digest,
            device=checkpoint.key.device,
            tensors=checkpoint.tensor_count,
            total_bytes=checkpoint.total_bytes,
            exclusive_bytes=checkpoint.exclusive_bytes,
            shared_bytes=checkpoint.shared_bytes,
            leases=len(parts.store.holders(checkpoint)),
            pinned=checkpoint.pinned,
            load_time=time_to(checkpoint.loaded),
            last_use_time=time_to(checkpoint.last_used),
            state=checkpoint_pb2.CHECKPOINT_STATE_RESIDENT,
            owner_uid=owner or 0,
            owner=user_name(owner),
        )

    def _loading(self, load: Load) -> checkpoint_pb2.Checkpoint:
        request = load.request
        return checkpoint_pb2.Checkpoint(
            names=[request.name] if request.name else [],
            device=request.device,
            total_bytes=load.progress.total,
            pinned=request.pin,
            state=checkpoint_pb2.CHECKPOINT_STATE_LOADING,
            owner_uid=request.who.uid or 0,
            owner=user_name(request.who.uid),
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


async def _nothing() -> AsyncIterator[dict[str, Any]]:
    """No messages: a device without a blob to verify."""
    for message in ():
        yield message


def _result(name: str, outcome: Outcome, device: str) -> checkpoint_pb2.LoadEvent:
    result = checkpoint_pb2.LoadResult(
        name=name,
        content_digest=outcome.content_digest,
        tensors=outcome.tensors,
        total_bytes=outcome.total_bytes,
        unique_bytes=outcome.unique_bytes,
        shared_bytes=outcome.total_bytes - outcome.unique_bytes,
        read_bytes=outcome.read_bytes,
        seconds=outcome.seconds,
        device=device,
    )
    return checkpoint_pb2.LoadEvent(result=result)


class ControlPlane:
    """The gRPC server with its services, health and reflection."""

    def __init__(self, parts: Parts) -> None:
        options = [("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE)]
        self._server = grpc.aio.server(interceptors=[ErrorMapping()], options=options)
        self._health = HealthServicer()
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
        """Refuse new calls, give those under way `grace` seconds, then end."""
        await asyncio.shield(self._server.stop(grace))
