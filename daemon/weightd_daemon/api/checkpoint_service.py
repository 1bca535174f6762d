"""CheckpointService: decodes requests, queries the core, encodes replies."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import AsyncIterator, Callable
from typing import Any

from weightd._proto.v1 import checkpoint_pb2, checkpoint_pb2_grpc
from weightd._transport.convert import source_to
from weightd.errors import DeviceError, DigestMismatchError, InvalidReferenceError, PermissionDeniedError
from weightd_daemon.core.blob import Blob
from weightd_daemon.core.catalog import CatalogTag
from weightd_daemon.core.checkpoint import Checkpoint
from weightd_daemon.core.principal import Principal
from weightd_daemon.devices.naming import meant, place
from weightd_daemon.handles.attach import shown, sources_from
from weightd_daemon.handles.connections import HandleSocketConnection
from weightd_daemon.inspection.loads_under_way import PHASES
from weightd_daemon.loads import flight
from weightd_daemon.loads.request import NO_GROUPS, LoadGroups, LoadOutcome, LoadRequest, LoadStatus
from weightd_daemon.loads.verification import LoadVerification
from weightd_daemon.turns import LoopTurn
from weightd_daemon.wire import time_to, user_name

from .context import GrpcServiceContext
from .error_mapping import Context
from .results import result_to

MAX_GROUPED = 200_000
"""Tensors in the groups of one load: the largest mixtures of experts have half as many."""

_COUNTED_AT_ONCE = 2000
"""Blobs that are looked at before others may have their turn on the loop."""

_NAME_STATES = {
    "resident": checkpoint_pb2.CHECKPOINT_STATE_RESIDENT,
    "absent": checkpoint_pb2.CHECKPOINT_STATE_ABSENT,
    "lost": checkpoint_pb2.CHECKPOINT_STATE_LOST,
    "evicted": checkpoint_pb2.CHECKPOINT_STATE_EVICTED,
}


class CheckpointService(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """gRPC service that loads, names, lists and removes checkpoints."""

    def __init__(self, parts: GrpcServiceContext) -> None:
        self._parts = parts

    async def Load(  # noqa: N802  # named by the proto
        self, request: checkpoint_pb2.LoadRequest, context: Context
    ) -> AsyncIterator[checkpoint_pb2.LoadEvent]:
        """Answer at once when the files' checkpoint is resident; otherwise load, or join the load under way."""
        parts = self._parts
        connection, who = parts.caller(context)
        intake = connection.pop_offer(request.offer_id)
        try:
            wish = self._wish(connection, who, request)
            if wish.name and not wish.name_is_default:
                parts.catalog.check(who, wish.name)
            resident = parts.loads.find_resident(wish)
        except BaseException:
            os.close(intake)  # the offer is over with its load, also where that is refused
            raise
        if resident is not None:
            os.close(intake)
            parts.store.leases.admit()
            name = parts.loads.answer(wish, resident)
            outcome = LoadOutcome(resident.key.content_digest, resident.tensor_count, resident.total_bytes, 0, 0, 0.0)
            yield _result(name, outcome, wish, None)
            return
        try:
            while True:
                load, waiter, begins = parts.loads.start(wish, intake)
                try:
                    if begins:
                        intake = -1
                        if await load.has_loader():
                            yield checkpoint_pb2.LoadEvent(feed=checkpoint_pb2.LoadFeed())
                    elif not await load.has_files():
                        parts.caller(context)  # still there: a lease of a closed connection would have no end
                        continue  # whoever began it left before its files had come; we have them, too
                    async with contextlib.aclosing(load.events()) as events:
                        async for progress in events:
                            yield _progress(progress)
                    checkpoint, outcome = load.done.result()
                    yield _result(parts.loads.name_and_pin(wish, checkpoint), outcome, wish, load.request)
                    return
                finally:
                    parts.loads.leave(load, waiter)
        finally:
            if intake >= 0:
                os.close(intake)

    async def List(  # noqa: N802
        self, request: checkpoint_pb2.ListCheckpointsRequest, context: Context
    ) -> checkpoint_pb2.ListCheckpointsResponse:
        """Everything resident, absent or lost that the caller may see, then the loads under way; names if asked for."""
        _, who = self._parts.caller(context)
        parts, turn = self._parts, LoopTurn()
        if request.name:
            found = parts.catalog.named(who, request.name)
            return checkpoint_pb2.ListCheckpointsResponse(names=[_name(request.name, *found)] if found else [])
        # In one step with what is resident: a load that is sealed while they are counted would be in neither.
        under_way = [
            self._loading(load) for load in parts.loads.under_way if who.admin or load.request.who.domain == who.domain
        ]
        rows = []
        for checkpoint in list(parts.catalog.visible(who)):
            await parts.sharing.caught_up()
            if parts.store.checkpoints.get(checkpoint.key) is checkpoint:
                rows.append((checkpoint, self._checkpoint(checkpoint)))
            if turn.is_over:
                await turn.next()
        there = [row for one, row in rows if parts.store.checkpoints.get(one.key) is one]  # what went is lost, or gone
        there += [self._lost(lost.checkpoint) for lost in parts.catalog.lost(who)]
        there.sort(key=lambda checkpoint: (not checkpoint.names, list(checkpoint.names), checkpoint.content_digest))
        listed = self._parts.catalog.listed(who) if request.names else []
        names = [_name(*one) for one in listed]
        return checkpoint_pb2.ListCheckpointsResponse(checkpoints=there + under_way, names=names)

    async def Get(  # noqa: N802
        self, request: checkpoint_pb2.GetCheckpointRequest, context: Context
    ) -> checkpoint_pb2.GetCheckpointResponse:
        """One checkpoint with its parts."""
        _, who = self._parts.caller(context)
        device_name, turn = meant(self._parts.devices, request.device), LoopTurn()
        while True:
            checkpoint = self._parts.catalog.find(who, request.reference, device_name)
            components = [
                await _component(name, tensors, checkpoint.components.get(name, []), turn)
                for name, tensors in sorted(checkpoint.tensors.items())
            ]
            await self._parts.sharing.caught_up()
            if self._parts.store.checkpoints.get(checkpoint.key) is checkpoint:
                break  # else it went while it was counted: find says so, or finds what has its name now
        device = self._parts.devices[checkpoint.key.device]
        return checkpoint_pb2.GetCheckpointResponse(
            checkpoint=self._checkpoint(checkpoint),
            components=components,
            segments=len(checkpoint.segments),
            kind=device.kind,
            note=self._parts.store.absent.get(checkpoint.key.device, device.note),
            sources=[source_to(source) for source in checkpoint.origin],
            reference=checkpoint.reference,
        )

    async def Pin(  # noqa: N802
        self, request: checkpoint_pb2.PinCheckpointRequest, context: Context
    ) -> checkpoint_pb2.PinCheckpointResponse:
        """Keep a checkpoint."""
        changed = await self._change(self._parts.catalog.pin, request, context)
        return checkpoint_pb2.PinCheckpointResponse(checkpoint=changed)

    async def Unpin(  # noqa: N802
        self, request: checkpoint_pb2.UnpinCheckpointRequest, context: Context
    ) -> checkpoint_pb2.UnpinCheckpointResponse:
        """Let a checkpoint be evicted again."""
        changed = await self._change(self._parts.catalog.unpin, request, context)
        return checkpoint_pb2.UnpinCheckpointResponse(checkpoint=changed)

    async def Remove(  # noqa: N802
        self, request: checkpoint_pb2.RemoveCheckpointRequest, context: Context
    ) -> checkpoint_pb2.RemoveCheckpointResponse:
        """Drop a name, and with the last one the checkpoint."""
        connection, who = self._parts.caller(context)
        device = meant(self._parts.devices, request.device)
        freed = self._parts.catalog.remove(who, request.reference, device, connection.peer)
        return checkpoint_pb2.RemoveCheckpointResponse(freed_bytes=freed)

    async def Verify(  # noqa: N802
        self, request: checkpoint_pb2.VerifyCheckpointRequest, context: Context
    ) -> AsyncIterator[checkpoint_pb2.VerifyEvent]:
        """Hash blobs again, device by device, while waiting leases keep them in place; whoever asked only looks on."""
        parts = self._parts
        connection, who = parts.caller(context)
        device_meant = meant(parts.devices, request.device)

        def choose() -> list[Checkpoint]:
            store = parts.store
            if request.reference:
                found = parts.catalog.find(who, request.reference, device_meant)
                store.check_present(found.key.device, f"checkpoint {request.reference}")
                return [found]
            if device_meant:
                store.check_present(device_meant)
            there = parts.catalog.visible(who)
            return [c for c in there if device_meant in ("", c.key.device) and not store.is_absent(c)]

        verification = parts.loads.verifications.begin(who, connection.peer, choose, self._loss)
        try:
            async with contextlib.aclosing(verification.changes()) as changes:
                async for _ in changes:
                    yield _verified(verification)
            bad = verification.done.result()
        finally:  # with this call, not when the collector comes
            verification.cancel()
        if bad:
            named = [c for c in verification.chosen if any(number in c.unique for number in bad)]
            names = ", ".join(self._called(checkpoint) for checkpoint in named[:5])
            raise DigestMismatchError(
                f"{len(bad)} of {verification.total_blobs} blobs no longer match their digest, in {names};"
                " remove and load again"
            )
        yield _verified(verification)

    def _wish(
        self, connection: HandleSocketConnection, who: Principal, request: checkpoint_pb2.LoadRequest
    ) -> LoadRequest:
        device = place(self._parts.devices, self._parts.default_device, request.device)
        self._parts.store.check_present(device)
        if request.pin and who.uid is None:
            raise PermissionDeniedError("your user id is not known here, so you cannot pin")
        if not request.sources:
            raise InvalidReferenceError("the load names no files")
        return LoadRequest(
            who=who,
            peer=connection.peer,
            sources=sources_from(request.sources),
            device=device,
            name=request.name,
            name_is_default=request.name_is_default,
            pin=request.pin,
            detached=request.detached,
            verify=request.verify,
            reference=shown(request.reference),
            groups=_groups(request),
        )

    async def _change(
        self, change: Callable[[Principal, Checkpoint, str], None], request: Any, context: Context
    ) -> checkpoint_pb2.Checkpoint:
        _, who = self._parts.caller(context)
        checkpoint = self._parts.catalog.find(who, request.reference, meant(self._parts.devices, request.device))
        change(who, checkpoint, request.reference)
        await self._parts.sharing.caught_up()
        return self._checkpoint(checkpoint)

    def _checkpoint(self, checkpoint: Checkpoint) -> checkpoint_pb2.Checkpoint:
        """What is reported of a checkpoint; of one that has gone, nothing is exclusive. The index is caught up with."""
        parts = self._parts
        owner = parts.catalog.owner(checkpoint)
        exclusive = parts.store.sharing.exclusive_bytes(checkpoint)
        return checkpoint_pb2.Checkpoint(
            names=parts.catalog.names(checkpoint),
            content_digest=checkpoint.key.content_digest,
            device=checkpoint.key.device,
            tensors=checkpoint.tensor_count,
            total_bytes=checkpoint.total_bytes,
            exclusive_bytes=exclusive,
            shared_bytes=checkpoint.total_bytes - exclusive,
            leases=len(parts.store.leases_of(checkpoint)),
            pinned=checkpoint.pinned,
            load_time=time_to(checkpoint.loaded),
            last_use_time=time_to(checkpoint.last_used),
            state=_NAME_STATES["absent" if parts.store.is_absent(checkpoint) else "resident"],
            owner_uid=owner,
            owner=user_name(owner),
        )

    def _loss(self, checkpoint: Checkpoint) -> DeviceError:
        """Why a checkpoint could not be verified; it may have been loaded again meanwhile."""
        called = self._called(checkpoint)
        lost = self._parts.store.lost.get(checkpoint.key)
        return lost.error(called) if lost else DeviceError(f"checkpoint {called} was lost meanwhile; verify again")

    def _called(self, checkpoint: Checkpoint) -> str:
        return self._parts.catalog.name(checkpoint) or checkpoint.key.content_digest[:19]

    def _lost(self, checkpoint: Checkpoint) -> checkpoint_pb2.Checkpoint:
        """A lost checkpoint takes no memory: only what it was is left."""
        message = self._checkpoint(checkpoint)
        message.state = checkpoint_pb2.CHECKPOINT_STATE_LOST
        message.exclusive_bytes = message.shared_bytes = message.leases = 0
        return message

    def _loading(self, load: flight.InFlightLoad) -> checkpoint_pb2.Checkpoint:
        request = load.request
        return checkpoint_pb2.Checkpoint(
            names=[request.name] if request.name else [],
            device=request.device,
            total_bytes=load.progress.total,
            pinned=request.pin,
            state=checkpoint_pb2.CHECKPOINT_STATE_LOADING,
            owner_uid=request.who.uid,
            owner=user_name(request.who.uid),
        )


def _name(name: str, tag: CatalogTag, state: str) -> checkpoint_pb2.Name:
    return checkpoint_pb2.Name(
        name=name, content_digest=tag.content_digest, state=_NAME_STATES[state], owner_uid=tag.owner,
        owner=user_name(tag.owner), is_default=tag.is_default,
    )  # fmt: skip


async def _component(name: str, tensors: int, blobs: list[Blob], turn: LoopTurn) -> checkpoint_pb2.Component:
    total = shared = 0
    for start in range(0, len(blobs), _COUNTED_AT_ONCE):
        some = blobs[start : start + _COUNTED_AT_ONCE]
        total += sum([blob.key.length for blob in some])
        shared += sum([blob.key.length for blob in some if blob.references > 1])
        if turn.is_over:
            await turn.next()
    return checkpoint_pb2.Component(name=name, tensors=tensors, total_bytes=total, shared_bytes=shared)


def _progress(progress: LoadStatus) -> checkpoint_pb2.LoadEvent:
    report = checkpoint_pb2.LoadProgress(
        phase=PHASES[progress.phase], done_bytes=progress.done, total_bytes=progress.total
    )
    return checkpoint_pb2.LoadEvent(progress=report)


def _verified(verification: LoadVerification) -> checkpoint_pb2.VerifyEvent:
    return checkpoint_pb2.VerifyEvent(
        done_blobs=verification.done_blobs,
        total_blobs=verification.total_blobs,
        done_bytes=verification.done_bytes,
        total_bytes=verification.total_bytes,
    )


def _groups(request: checkpoint_pb2.LoadRequest) -> LoadGroups:
    """The groups of a request. Which of them are heeded, the loader finds out: only that sees the files' headers."""
    sizes, numbers = request.group_sizes, request.group_tensors
    if len(numbers) > MAX_GROUPED or len(sizes) > len(numbers) or sum(sizes) != len(numbers):
        raise InvalidReferenceError(
            f"the load has {len(sizes)} groups of {sum(sizes)} tensors and names {len(numbers)}; at most {MAX_GROUPED}"
        )
    return LoadGroups(array("I", sizes), array("I", numbers)) if sizes else NO_GROUPS


def _order(outcome: LoadOutcome, wish: LoadRequest, load: LoadRequest | None) -> checkpoint_pb2.LoadOrder:
    """By whose groups a request's checkpoint lies now: its own, those of the load that it joined, or earlier ones."""
    if wish.groups is NO_GROUPS:
        return checkpoint_pb2.LOAD_ORDER_UNSPECIFIED
    if load is None or (outcome.total_bytes and not outcome.unique_bytes):
        return checkpoint_pb2.LOAD_ORDER_RESIDENT
    return checkpoint_pb2.LOAD_ORDER_REQUESTED if load.groups == wish.groups else checkpoint_pb2.LOAD_ORDER_JOINED


def _result(name: str, outcome: LoadOutcome, wish: LoadRequest, load: LoadRequest | None) -> checkpoint_pb2.LoadEvent:
    """The last event: for one wish, of the load that was begun with another or the same, if there was one."""
    result = result_to(name, outcome, wish.device)
    result.order = _order(outcome, wish, load)
    if result.order == checkpoint_pb2.LOAD_ORDER_REQUESTED:
        result.groups = outcome.groups
        result.ignored_groups.extend(outcome.ignored_groups)
    return checkpoint_pb2.LoadEvent(result=result)
