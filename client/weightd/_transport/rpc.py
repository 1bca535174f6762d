"""The gRPC client: calls, messages as plain values, errors as weightd's own. Imported when first needed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

from weightd._limits import MAX_LOAD_REQUEST, out_of_descriptors
from weightd._proto.v1 import (
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    composition_pb2,
    composition_pb2_grpc,
    daemon_pb2,
    daemon_pb2_grpc,
    errors_pb2,
    inspection_pb2_grpc,
    lease_pb2,
    lease_pb2_grpc,
)
from weightd.errors import (
    DaemonUnreachableError,
    InvalidReferenceError,
    LeaseLostError,
    ProtocolMismatchError,
    ServerError,
    WeightdError,
    from_wire,
)
from weightd.types import (
    BooksStats,
    CheckpointDetails,
    CheckpointInfo,
    ComponentInfo,
    DaemonEvent,
    DeviceStats,
    DigestIndexStats,
    DrainResult,
    LeaseInfo,
    LoadProgress,
    LoadResult,
    NameInfo,
    Stats,
    VerifyProgress,
    VersionInfo,
)

from .address import grpc_target
from .convert import checkpoint_from, event_from, lease_from, name_from, progress_from, result_from, source_from
from .inspection_rpc import InspectionRpc
from .unreachable import probe, unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

_MAX_MESSAGE = 64 << 20
_STATES = {daemon_pb2.DAEMON_STATE_DRAINING: "draining", daemon_pb2.DAEMON_STATE_DRAINED: "drained"}


class RpcClient:
    """The client's end of the control socket: gRPC calls on behalf of one handle-socket connection.

    `timeout` (seconds) bounds every call that answers at once, so not load, verify, drain and following events.
    """

    def __init__(self, path: Path, token: str, timeout: float) -> None:
        self.token = token
        self._path = path
        self._timeout = timeout
        self._metadata = (("weightd-token", token),)
        options = [
            ("grpc.max_receive_message_length", _MAX_MESSAGE),
            ("grpc.max_send_message_length", _MAX_MESSAGE),
            ("grpc.enable_http_proxy", 0),
        ]
        self._closed = False
        self._channel = grpc.insecure_channel(grpc_target(path), options=options)
        self._checkpoints = checkpoint_pb2_grpc.CheckpointServiceStub(self._channel)
        self._compositions = composition_pb2_grpc.CompositionServiceStub(self._channel)
        self._leases = lease_pb2_grpc.LeaseServiceStub(self._channel)
        self._daemon = daemon_pb2_grpc.DaemonServiceStub(self._channel)
        self.inspection = InspectionRpc(inspection_pb2_grpc.InspectionServiceStub(self._channel), self._call)
        """The calls of InspectionService."""

    def close(self) -> None:
        """Close the channel."""
        self._closed = True
        self._channel.close()

    def load(
        self,
        request: checkpoint_pb2.LoadRequest,
        on_feed: Callable[[], None],
        on_progress: Callable[[LoadProgress], None] | None,
    ) -> LoadResult | None:
        """Run a load to its end; of a detached one, return None when its files have been fed.

        Errors: InvalidReferenceError (the list of files is too long), and those of the daemon.
        """
        if (size := request.ByteSize()) > MAX_LOAD_REQUEST:
            raise InvalidReferenceError(
                f"the list of {len(request.sources)} files and the groups take {size} bytes, and a load may have "
                f"{MAX_LOAD_REQUEST}; shorten the names, or load without groups"
            )
        result: LoadResult | None = None
        with self._errors():
            call = self._checkpoints.Load(request, metadata=self._metadata)
            try:
                for event in call:
                    kind = event.WhichOneof("event")
                    if kind == "feed":
                        on_feed()
                    if request.detached and kind != "result":
                        return None
                    if kind == "progress" and on_progress is not None:
                        on_progress(progress_from(event.progress))
                    elif kind == "result":
                        result = result_from(event.result)  # the stream ends now: a cancelled call would count as such
            finally:
                call.cancel()
        if result is None:
            raise ServerError("the daemon ended the load without a result")
        return result

    def compose(self, request: composition_pb2.ComposeRequest) -> LoadResult:
        """Run a composition to its end. Errors: InvalidReferenceError (the list is too long), those of the daemon."""
        if (size := request.ByteSize()) > MAX_LOAD_REQUEST:
            raise InvalidReferenceError(
                f"the list of {len(request.names)} tensors takes {size} bytes, and a composition may have "
                f"{MAX_LOAD_REQUEST}; shorten the names, or give the tensors the same names in their sources"
            )
        with self._errors():
            return result_from(self._compositions.Compose(request, metadata=self._metadata).result)

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every checkpoint."""
        response = self._call(self._checkpoints.List, checkpoint_pb2.ListCheckpointsRequest())
        return [checkpoint_from(checkpoint) for checkpoint in response.checkpoints]

    def names(self) -> list[NameInfo]:
        """Every name."""
        response = self._call(self._checkpoints.List, checkpoint_pb2.ListCheckpointsRequest(names=True))
        return [name_from(name) for name in response.names]

    def name(self, name: str) -> NameInfo | None:
        """One name; None where there is no such."""
        response = self._call(self._checkpoints.List, checkpoint_pb2.ListCheckpointsRequest(names=True, name=name))
        return next((name_from(one) for one in response.names if one.name == name), None)

    def get(self, reference: str, device: str) -> CheckpointDetails:
        """One checkpoint."""
        request = checkpoint_pb2.GetCheckpointRequest(reference=reference, device=device)
        response = self._call(self._checkpoints.Get, request)
        components = tuple(ComponentInfo(c.name, c.tensors, c.total_bytes, c.shared_bytes) for c in response.components)
        sources = tuple(source_from(source) for source in response.sources)
        info = checkpoint_from(response.checkpoint)
        return CheckpointDetails(
            info, components, response.segments, sources, response.kind, response.note, response.reference
        )

    def pin(self, reference: str, device: str) -> CheckpointInfo:
        """Pin."""
        request = checkpoint_pb2.PinCheckpointRequest(reference=reference, device=device)
        return checkpoint_from(self._call(self._checkpoints.Pin, request).checkpoint)

    def unpin(self, reference: str, device: str) -> CheckpointInfo:
        """Unpin."""
        request = checkpoint_pb2.UnpinCheckpointRequest(reference=reference, device=device)
        return checkpoint_from(self._call(self._checkpoints.Unpin, request).checkpoint)

    def remove(self, reference: str, device: str) -> int:
        """Remove; returns bytes given up."""
        request = checkpoint_pb2.RemoveCheckpointRequest(reference=reference, device=device)
        return int(self._call(self._checkpoints.Remove, request).freed_bytes)

    def verify(
        self, reference: str, device: str, on_progress: Callable[[VerifyProgress], None] | None
    ) -> VerifyProgress:
        """Verify; returns the final figures."""
        request = checkpoint_pb2.VerifyCheckpointRequest(reference=reference, device=device)
        last = VerifyProgress(0, 0, 0, 0)
        with self._errors():
            call = self._checkpoints.Verify(request, metadata=self._metadata)
            try:
                for event in call:
                    last = VerifyProgress(event.done_blobs, event.total_blobs, event.done_bytes, event.total_bytes)
                    if on_progress is not None:
                        on_progress(last)
            finally:
                call.cancel()
        return last

    def leases(self) -> list[LeaseInfo]:
        """Every lease."""
        response = self._call(self._leases.List, lease_pb2.ListLeasesRequest())
        return [lease_from(lease) for lease in response.leases]

    def stats(self) -> Stats:
        """The books."""
        response = self._call(self._daemon.GetStats, daemon_pb2.GetStatsRequest())
        devices = tuple(
            DeviceStats(
                uuid=d.uuid, kind=d.kind, name=d.name, budget_bytes=d.budget_bytes, used_bytes=d.used_bytes,
                live_bytes=d.live_bytes, reusable_bytes=d.reusable_bytes, in_flight_bytes=d.in_flight_bytes,
                free_bytes=d.free_bytes, segments=d.segments,
                device_free_bytes=d.device_free_bytes if d.HasField("device_free_bytes") else None,
                absence=d.absence, pinned_bytes=d.pinned_bytes, leased_bytes=d.leased_bytes,
                evictable_bytes=d.evictable_bytes, hole_bytes=d.hole_bytes,
            )
            for d in response.devices
        )  # fmt: skip
        index = response.digest_index
        return Stats(
            devices=devices,
            logical_bytes=response.logical_bytes,
            resident_bytes=response.resident_bytes,
            saved_bytes=response.saved_bytes,
            saved_ratio=response.saved_ratio,
            checkpoints=response.checkpoints,
            blobs=response.blobs,
            leases=response.leases,
            digest_collisions=response.digest_collisions,
            evictions=response.evictions,
            state=_STATES.get(response.state, "serving"),
            digest_index=DigestIndexStats(index.path, index.problem, index.failures)
            if response.HasField("digest_index")
            else None,
            books=BooksStats(response.books.limit_bytes, response.books.used_bytes)
            if response.HasField("books")
            else None,
            revision=response.revision,
        )

    def events(self, *, follow: bool) -> Iterator[DaemonEvent]:
        """Events as they come."""
        request = daemon_pb2.WatchEventsRequest(follow=follow)
        with self._errors():
            timeout = None if follow else self._timeout
            call = self._daemon.WatchEvents(request, metadata=self._metadata, timeout=timeout)
            try:
                for event in call:
                    yield event_from(event)
            finally:
                call.cancel()

    def name_changes(self, name: str) -> Generator[NameInfo | None, None, None]:
        """What a name means, at once and whenever that may have changed; it may be the same as before."""
        with self._errors():
            call = self._daemon.WatchEvents(daemon_pb2.WatchEventsRequest(follow=True), metadata=self._metadata)
            try:
                now = self.name(name)  # the call has begun: what changes from here on is among its events
                yield now
                for event in call:
                    if _concerns(event, name, now):
                        now = self.name(name)
                        yield now
            finally:
                call.cancel()

    def drain(
        self, timeout: float | None, on_holders: Callable[[list[LeaseInfo]], None] | None, forget: str = ""
    ) -> DrainResult:
        """Drain to the end, or have one device forgotten."""
        request = daemon_pb2.DrainRequest(timeout_seconds=timeout, forget=forget)
        result: DrainResult | None = None
        with self._errors():
            call = self._daemon.Drain(request, metadata=self._metadata)
            try:
                for event in call:
                    if event.WhichOneof("event") == "result":
                        result = DrainResult(event.result.checkpoints, event.result.freed_bytes)
                    elif on_holders is not None:
                        on_holders([lease_from(lease) for lease in event.holders.leases])
            finally:
                call.cancel()
        if result is None:
            raise ServerError("the daemon ended the drain without a result")
        return result

    def undrain(self) -> None:
        """End the drain."""
        self._call(self._daemon.Undrain, daemon_pb2.UndrainRequest())

    def version(self) -> VersionInfo:
        """Who answers."""
        response = self._call(self._daemon.GetVersion, daemon_pb2.GetVersionRequest())
        return VersionInfo(response.version, response.pid, response.uptime_seconds)

    def _call(self, method: Any, request: Any) -> Any:
        with self._errors():
            return method(request, metadata=self._metadata, timeout=self._timeout)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn a failed call into the error that the daemon raised, or into why it cannot be reached."""
        try:
            yield
        except grpc.RpcError as error:
            raise _error_from(error, self._path, self._timeout) from None
        except ValueError as error:  # of grpc, where another thread has closed the channel
            if isinstance(error, WeightdError) or not self._closed:
                raise
            raise LeaseLostError("the client was closed, or connected anew, during the call; call again") from None


_OF_NAMES = {daemon_pb2.EVENT_KIND_NAMED, daemon_pb2.EVENT_KIND_UNNAMED}
_OF_CONTENTS = {daemon_pb2.EVENT_KIND_SEALED, daemon_pb2.EVENT_KIND_EVICTED}
_OF_DEVICES = {
    daemon_pb2.EVENT_KIND_DEVICE_LOST, daemon_pb2.EVENT_KIND_DEVICE_ABSENT, daemon_pb2.EVENT_KIND_DEVICE_BACK,
}  # fmt: skip


def _concerns(event: daemon_pb2.Event, name: str, now: NameInfo | None) -> bool:
    """Whether an event may have changed what a name means, which was `now`, or the state of that."""
    if event.kind in _OF_NAMES:
        return name in event.names
    if now is None:
        return False
    return event.kind in _OF_DEVICES or (event.kind in _OF_CONTENTS and event.content_digest == now.content_digest)


def _error_from(error: grpc.RpcError, path: Path, timeout: float) -> WeightdError:
    call: Any = error  # a failed call is both, says grpc's documentation
    for key, value in call.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = errors_pb2.Status.FromString(value)
            info = errors_pb2.ErrorInfo.FromString(status.details[0].value)
            metadata = dict(info.metadata)
            if metadata.get("refused") == "token":  # of the connection that we had: another daemon is there by now
                text = f"the weightd daemon at {path} has restarted, or closed our connection; call again"
                return DaemonUnreachableError(text, metadata)
            return from_wire(info.reason, status.message, metadata)
    code, details = call.code(), call.details()
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        if limit := out_of_descriptors("calling the weightd daemon"):  # and gRPC lays it on the daemon
            return limit
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return unreachable(path, TimeoutError(), timeout)
        # gRPC knows the cause as a sentence; the kernel has it as a number
        return probe(path, timeout) or DaemonUnreachableError(f"the weightd daemon at {path} hung up: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolMismatchError(
            f"the weightd daemon at {path} is older than this client and does not know the call; update the daemon"
        )
    if code is grpc.StatusCode.CANCELLED:
        return LeaseLostError("the call was cancelled; the daemon may be stopping")
    return ServerError(f"{code.name}: {details}")
