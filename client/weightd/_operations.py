"""List and change the state of a daemon: checkpoints, leases, statistics, pins, names, drains."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, TypeVar

from ._devices import device_name
from ._inspection_operations import InspectionOperations
from ._proto.v1 import handles_pb2
from ._transport.convert import source_to
from ._transport.handle_socket import fit
from .errors import DeviceError, FormatError, InvalidReferenceError, NotFoundError
from .resolve import Reference, Resolved, files_of, is_path, open_sources, reference_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .attachment import Attachment
    from .types import (
        CheckpointDetails,
        CheckpointInfo,
        DaemonEvent,
        DrainResult,
        LeaseInfo,
        NameInfo,
        Stats,
        TensorKey,
        VerifyProgress,
        VersionInfo,
    )

T = TypeVar("T")


class Operations(InspectionOperations):
    """The part of a client that neither loads nor attaches."""

    _read_only = False
    """Whether the connection only looks."""

    # -- looking -----------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[CheckpointInfo]:
        """Every checkpoint that is resident, absent or lost with its device, or being loaded."""
        return self._rpc().checkpoints()

    def names(self) -> list[NameInfo]:
        """Every name, sorted, also those whose content was evicted: they stay their owners'."""
        return self._rpc().names()

    def inspect(self, reference: Reference, device: str | None = None) -> CheckpointDetails:
        """One checkpoint more closely. Errors: NotFoundError, InvalidReferenceError, DeviceError (it was lost)."""
        return self._known(self._rpc().get, reference, device)

    def leases(self) -> list[LeaseInfo]:
        """Which process holds which checkpoint."""
        return self._rpc().leases()

    def stats(self) -> Stats:
        """The daemon's books."""
        return self._rpc().stats()

    def events(self, *, follow: bool = False) -> Iterator[DaemonEvent]:
        """What has happened lately, oldest first, and with `follow` what happens, without end.

        Errors: EventsLostError (read too slowly), InUseError (too many readers).
        """
        return self._rpc().events(follow=follow)

    def version(self) -> VersionInfo:
        """Who answers."""
        return self._rpc().version()

    def ping(self) -> float:
        """Seconds that one call takes; the first one includes setting up the channel."""
        rpc = self._rpc()
        start = time.perf_counter()
        rpc.version()
        return time.perf_counter() - start

    # -- changing ----------------------------------------------------------------------------------------------------

    def pin(self, reference: Reference, device: str | None = None) -> CheckpointInfo:
        """Keep a checkpoint from eviction.

        Errors: NotFoundError, InvalidReferenceError, DeviceError (it was lost), PermissionDeniedError.
        """
        return self._known(self._rpc().pin, reference, device)

    def unpin(self, reference: Reference, device: str | None = None) -> CheckpointInfo:
        """Take our pin back.

        Errors: NotFoundError, InvalidReferenceError, DeviceError (it was lost), PermissionDeniedError.
        """
        return self._known(self._rpc().unpin, reference, device)

    def remove(self, reference: Reference, device: str | None = None) -> int:
        """Drop a name, and with the last one the checkpoint. Returns the bytes given up.

        Errors: NotFoundError, PermissionDeniedError, InUseError.
        """
        return self._named(self._rpc().remove, reference, device)

    def verify(
        self,
        reference: Reference | None = None,
        device: str | None = None,
        on_progress: Callable[[VerifyProgress], None] | None = None,
    ) -> VerifyProgress:
        """Hash resident blobs again, of one checkpoint or of all.

        Errors: DigestMismatchError, NotFoundError, InvalidReferenceError, DeviceError (it was lost, or the driver
        failed).
        """
        rpc = self._rpc()
        if reference is None:
            return rpc.verify("", device_name(device), on_progress)
        return self._known(lambda name, where: rpc.verify(name, where, on_progress), reference, device)

    def drain(
        self, *, timeout: float | None = None, on_holders: Callable[[list[LeaseInfo]], None] | None = None
    ) -> DrainResult:
        """Empty the daemon: nothing new is lent or loaded, and when nobody holds anything any more, everything goes.

        The drain goes on when this call ends early, until `undrain`. `timeout` is seconds; `on_holders` is called with
        the leases that are waited for, at first and when they have changed. Errors: PermissionDeniedError (only admins
        may), InUseError (leases are held after `timeout`), LeaseLostError (somebody took the drain back).
        """
        return self._rpc().drain(timeout, on_holders)

    def forget(
        self,
        device: str,
        *,
        timeout: float | None = None,
        on_holders: Callable[[list[LeaseInfo]], None] | None = None,
    ) -> DrainResult:
        """Empty one device, absent or not, and let go of all that is kept of it; the rest of the daemon serves on.

        It is served again when the daemon starts again or reads its settings again, or by `undrain`. If this call ends
        early, the device goes on with what is left on it. `timeout` and `on_holders` are as in `drain`. Errors:
        PermissionDeniedError (only admins may), InUseError (leases are held after `timeout`, or a loader that was ended
        still has memory open), NotFoundError (no such device).
        """
        return self._rpc().drain(timeout, on_holders, device_name(device))

    def undrain(self) -> None:
        """Let attaches and loads in again, and serve devices that were forgotten. Errors: PermissionDeniedError."""
        self._rpc().undrain()

    @abstractmethod
    def _attach(
        self, request: handles_pb2.AttachRequest, components: frozenset[str], keys: frozenset[TensorKey]
    ) -> Attachment:
        """Attach as a request says."""

    # -- inside ------------------------------------------------------------------------------------------------------

    def _known(self, call: Callable[[str, str], T], reference: Reference, device: str | None) -> T:
        """Like `_named`, and if that names nothing, either, call with the content of the files that stand there.

        What stands at a path, only an attach can tell, which a read-only client may not: there it is a name.
        """
        if self._read_only:
            return call(reference.name if isinstance(reference, Resolved) else str(reference), device_name(device))
        try:
            return self._named(call, reference, device)
        except NotFoundError:
            if not isinstance(reference, Resolved) and not is_path(reference):
                raise
            found = self._resident(reference, device_name(device))
            if found is None:
                raise
            return call(*found)

    def _named(self, call: Callable[[str, str], T], reference: Reference, device: str | None) -> T:
        """Call with the name that a reference stands for: of a path that of its files, of anything else itself."""
        if isinstance(reference, Resolved):
            return call(reference.name, device_name(device))
        by_path = is_path(reference) and not self._means_name(reference, device_name(device))
        return call(reference_name(reference) if by_path else str(reference), device_name(device))

    def _means_name(self, reference: str | os.PathLike[str], device: str, *, to_load: bool = False) -> bool:
        """Whether a path is rather a resident checkpoint's name, because no other resident checkpoint stands there.

        Errors: InvalidReferenceError (it is the name of one content, and the path of another).
        """
        request = handles_pb2.AttachRequest(reference=str(reference), device=device, manifest_only=True)
        if not _may_be_a_name(reference) or not fit(request):
            return False
        try:
            with self._attach(request, frozenset(), frozenset()) as attachment:
                named = attachment.content_digest
        except NotFoundError:
            return False
        except DeviceError:  # lost with its device: what stands at the path can be loaded again
            return not to_load
        try:
            found = self._resident(reference, device)
        except (NotFoundError, FormatError, InvalidReferenceError):  # what stands there is no checkpoint
            return True
        if found is None and not to_load:  # nothing resident is called by that path
            return True
        if found is None or found[0] != named:
            raise InvalidReferenceError(
                f"{reference}: is a path here, and the name of a checkpoint that is resident; give ./{reference} for "
                "the path, or the checkpoint's digest"
            )
        return True

    def _resident(self, reference: Reference, device: str) -> tuple[str, str] | None:
        """Digest and device of the content of the files that stand there; None where it is not known to be resident.

        Errors: those of `resolve.resolve`.
        """
        with open_sources(files_of(reference)) as opened:
            sources = handles_pb2.SourceSet(sources=[source_to(source) for source in opened.sources])
        request = handles_pb2.AttachRequest(sources=sources, device=device, manifest_only=True)
        if not fit(request):
            return None
        try:
            with self._attach(request, frozenset(), frozenset()) as attachment:
                return attachment.content_digest, attachment.device
        except NotFoundError:
            return None


def _may_be_a_name(reference: str | os.PathLike[str]) -> bool:
    """Whether a path could name a checkpoint as well, as `prod` and `org/m` can."""
    return isinstance(reference, str) and not reference.startswith(("/", "./", "../", "~"))
