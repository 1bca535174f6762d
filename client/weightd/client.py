"""The client: a connection to one daemon, which loads checkpoints and attaches to them."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from . import _failpoints
from ._devices import device_name
from ._groups import Groups, add_groups
from ._limits import check_grpc_can_start
from ._operations import Operations
from ._proto.v1 import checkpoint_pb2, handles_pb2
from ._references.files import ReferencedFile, inodes
from ._transport.address import find_socket
from ._transport.connection import DaemonConnection
from ._transport.convert import check_name, source_to
from ._transport.handle_socket import feed, fit
from ._transport.unreachable import when_reachable
from .attachment import Attachment
from .composing import check_sealed, compose_request
from .errors import DaemonUnreachableError, ForkedError, FormatError, InvalidReferenceError, NotFoundError
from .resolve import Reference, Resolved, files_of, is_path, open_sources
from .types import CheckpointFile, CheckpointInfo, LoadProgress, LoadResult, TensorKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ._references.files import OpenedReference
    from ._transport.handle_socket import SocketClient
    from ._transport.rpc import RpcClient
    from .composing import ComposedTensor

T = TypeVar("T")
_FEED_SECONDS = 60.0
_LOADS = 3
"""How often an attach loads files whose checkpoint is evicted before it can be attached."""


def again_if_replaced(reference: Reference, use: Callable[[Resolved], T]) -> T:
    """Call `use` with the files of a reference, and once more if it fails and others stand there by then.

    A file that is replaced by rename while it is loaded was not written to: what stands there now is as good as it was.
    """
    chosen = files_of(reference)
    before = inodes(chosen.sources)
    try:
        return use(chosen)
    except (InvalidReferenceError, FormatError):  # "is not the file that was announced", "changed while it was read"
        if inodes(chosen.sources) == before:
            raise
    return use(files_of(reference))


def connect(
    socket: str | os.PathLike[str] | None = None,
    *,
    timeout: float = 5.0,
    fallback: Literal["error", "wait"] = "error",
    read_only: bool = False,
) -> Client:
    """Connect to the daemon at `socket` (default: WEIGHTD_SOCKET, the user's, the system's).

    `timeout` is seconds for each answer, at most a year. With `fallback="wait"` this waits for a daemon to come up, or
    to have room. A client that is `read_only` looks at the daemon and can neither change anything nor load or attach:
    those calls raise PermissionDeniedError. A reference is a name or a digest there, never a path. Errors:
    DaemonUnreachableError, PermissionDeniedError (this user may not reach it), ProtocolMismatchError,
    ResourceLimitError, InvalidReferenceError (`timeout` or `fallback`).
    """
    if fallback not in ("error", "wait"):
        raise InvalidReferenceError(f"fallback {fallback!r}: must be 'error' or 'wait'")
    return when_reachable(
        lambda: Client(find_socket(socket), timeout=timeout, read_only=read_only), wait=fallback == "wait"
    )


class Client(Operations):
    """A connection to one daemon. Safe for use from several threads; not usable in a forked child.

    When the daemon has been restarted, the next call connects anew. Attachments do not depend on the connection.
    """

    def __init__(self, path: Path, *, timeout: float = 5.0, read_only: bool = False) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._closed = False
        self._control: RpcClient | None = None
        self._connection = DaemonConnection(path, timeout, read_only=read_only)
        self._read_only = read_only
        self.socket = path
        """The daemon's control socket."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<weightd.Client of {self.socket}>"

    def close(self) -> None:
        """Hang up. Attachments and tensors stay; what was loaded and not attached may be evicted from now on."""
        if self._pid != os.getpid():  # and its lock may be held by a thread that is only in the parent
            self._closed = True
            return
        with self._lock:
            self._closed = True
            if self._control is not None:
                self._control.close()
                self._control = None
            self._connection.close()

    # -- loading and attaching -------------------------------------------------------------------------------------

    def load(
        self,
        reference: Reference,
        *,
        name: str | None = None,
        device: str | None = None,
        pin: bool = False,
        verify: bool = False,
        groups: Groups = (),
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> CheckpointInfo:
        """Make a checkpoint resident; nothing is read when it is already. It stays until it is attached or we leave.

        `reference` is a file, a directory, `org/name[@revision]` in the local Hugging Face cache, or files that were
        chosen already (`resolve.resolve(reference, variant="fp16")`); `name` is what to call it (default: the
        reference), `device` is "host", "cpu", "cuda", "cuda:N", a GPU's UUID, or None for the daemon's default.
        `groups` are tensors that should lie one behind the other, so that what is made of them can be a view
        (`Attachment.span`): each a sequence of names or (component, name), or a function that makes them of the files'
        tensors. That is a hint; `load_report` tells what came of it. Errors: InvalidReferenceError, NotFoundError,
        FormatError, CapacityError, DeviceMismatchError, DeviceError, PermissionDeniedError, LeaseLostError (the loader
        or the daemon ended), DaemonUnreachableError.
        """
        result = self.load_report(
            reference, name=name, device=device, pin=pin, verify=verify, groups=groups, on_progress=on_progress
        )
        assert result is not None  # only a detached load has no result
        return self._rpc().get(result.content_digest, result.device).checkpoint

    def load_report(
        self,
        reference: Reference,
        *,
        name: str | None = None,
        device: str | None = None,
        pin: bool = False,
        detached: bool = False,
        verify: bool = False,
        groups: Groups = (),
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> LoadResult | None:
        """Like `load`, and say what the load brought. A detached load goes on without us; then this returns None."""
        if name is not None:
            check_name(name)

        def load(resolved: Resolved) -> LoadResult | None:
            request = checkpoint_pb2.LoadRequest(
                name=name if name is not None else resolved.name,
                name_is_default=name is None,
                device=device_name(device),
                pin=pin,
                detached=detached,
                verify=verify,
            )
            with open_sources(resolved) as opened:
                return self._load(opened, request, groups, on_progress)

        return again_if_replaced(reference, load)

    def load_memory(
        self,
        descriptor: int,
        *,
        name: str | None = None,
        device: str | None = None,
        pin: bool = False,
        detached: bool = False,
    ) -> LoadResult | None:
        """Load a checkpoint that is in memory: a memfd with what a safetensors or GGUF file has, sealed (`SEALS`).

        The descriptor stays the caller's; it may be closed when this returns. Without a `name` the checkpoint has none.
        A detached load goes on without us; then this returns None. Errors: as of `load`, and InvalidReferenceError (not
        sealed).
        """
        check_sealed(descriptor)
        file = ReferencedFile("", "memory", Path(f"/proc/self/fd/{descriptor}"))
        # Always read and compared: the inode's number may have been another memfd's.
        return self.load_report(
            Resolved("", (file,)), name=name, device=device, pin=pin, detached=detached, verify=True
        )

    def compose(
        self,
        files: Iterable[CheckpointFile],
        tensors: Iterable[ComposedTensor],
        *,
        name: str | None = None,
        device: str | None = None,
        pin: bool = False,
        detached: bool = False,
        reference: str = "",
    ) -> LoadResult:
        """Make a checkpoint out of tensors that are resident on one device already; no byte is read or moved.

        The checkpoint is what a load of such files would bring, with the same content digest, and keeps its bytes when
        its sources are removed. If this fails, nothing has changed. Without a `name` it has none; `reference` is for
        people: what the content was found by. It stays until it is attached or we leave; one that is `detached` is made
        even if we leave, and may be evicted at once. Errors: InvalidReferenceError, NotFoundError (a source or tensor
        of one), CapacityError (books, or a limit of the user), InUseError (too many under way), PermissionDeniedError,
        DeviceError, DeviceAbsentError, LeaseLostError (the daemon ended), DaemonUnreachableError.
        """
        if name is not None:
            check_name(name)
        request = compose_request(files, tensors)
        request.name, request.device, request.reference = name or "", device_name(device), reference
        request.pin, request.detached = pin, detached
        return self._rpc().compose(request)

    def attach(
        self,
        reference: Reference,
        *,
        device: str | None = None,
        components: Iterable[str] = (),
        tensors: Iterable[TensorKey | tuple[str, str] | str] = (),
        manifest_only: bool = False,
        groups: Groups = (),
        peers: bool = False,
        populate: bool = False,
    ) -> Attachment:
        """Map a checkpoint into this process: all of it, some components, or some tensors.

        A path goes by the content of the files that stand there now, which are loaded when they are not resident, and
        so do files that were chosen by other rules (`resolve.Resolved`); any other reference is the name or digest of a
        resident checkpoint, on any device where `device` is None. A tensor is its name, or (component, name). `groups`
        are as in `load`, for where something has to be loaded; `Attachment.loaded` tells what came of that. `peers`
        lets the other GPUs of this process read the memory as well, where the hardware can (`Attachment.peers`).
        `populate` maps all pages now, and not at their first access (`Attachment.populate`); on a GPU it does nothing.
        Errors: NotFoundError, InvalidReferenceError, DeviceMismatchError (no such device, or this process does not see
        it), DeviceAbsentError (it is kept, on a device that cannot be used now), DeviceError (its driver failed, or
        what lay there was lost), those of `load` for a path, DaemonUnreachableError.
        """
        keys = frozenset(TensorKey("", key) if isinstance(key, str) else TensorKey(*key) for key in tensors)
        parts = frozenset(components)
        request = handles_pb2.AttachRequest(
            device=device_name(device),
            components=sorted(parts),
            tensors=[handles_pb2.TensorKey(component=key.component, name=key.name) for key in sorted(keys)],
            manifest_only=manifest_only,
        )
        if isinstance(reference, Resolved) or (
            is_path(reference) and not self._means_name(reference, request.device, to_load=True)
        ):
            attachment = again_if_replaced(
                reference, lambda files: self._attach_resolved(files, request, parts, keys, groups, peers)
            )
        else:
            request.reference = str(reference)
            if not fit(request):
                raise InvalidReferenceError("the reference is too long; name a checkpoint or a digest")
            attachment = self._attach(request, parts, keys, peers=peers)
        if populate:
            try:
                attachment.populate()
            except BaseException:
                attachment.close()
                raise
        return attachment

    # -- inside ------------------------------------------------------------------------------------------------------

    def _load(
        self,
        opened: OpenedReference,
        request: checkpoint_pb2.LoadRequest,
        groups: Groups,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> LoadResult | None:
        """Load what is opened, as a request says that lacks only the files and their groups."""
        self._check()
        request.sources.extend(source_to(source) for source in opened.sources)
        request.reference = opened.reference
        if groups != ():
            add_groups(request, groups, opened)
        with opened.errors_by_path():
            try:
                return self._load_offered(opened, request, on_progress)
            except DaemonUnreachableError as error:
                if error.metadata.get("refused") != "token":
                    raise
            return self._load_offered(opened, request, on_progress)  # the daemon restarted after it had our offer

    def _load_offered(
        self,
        opened: OpenedReference,
        request: checkpoint_pb2.LoadRequest,
        on_progress: Callable[[LoadProgress], None] | None,
    ) -> LoadResult | None:
        rpc = self._rpc()
        offer, intake = self._handles.offer()  # last: the daemon keeps what is offered until a load takes it
        _failpoints.reach("client.offered")
        with intake:
            request.offer_id = offer
            return rpc.load(request, lambda: feed(intake, opened.fds, _FEED_SECONDS), on_progress)

    def _attach_resolved(
        self,
        resolved: Resolved,
        request: handles_pb2.AttachRequest,
        components: frozenset[str],
        keys: frozenset[TensorKey],
        groups: Groups,
        peers: bool,
    ) -> Attachment:
        with open_sources(resolved) as opened:
            request.sources.CopyFrom(handles_pb2.SourceSet(sources=[source_to(source) for source in opened.sources]))
        # The files are closed whenever segments come: a process need not have descriptors for both at once.
        if fit(request):  # else a load tells the digest; it reads nothing of what is resident
            try:
                return self._attach(request, components, keys, peers=peers)
            except NotFoundError as error:
                if error.metadata.get("missing") != "sources":
                    raise
        for attempt in range(1, _LOADS + 1):
            with open_sources(resolved) as opened:
                wish = checkpoint_pb2.LoadRequest(name=resolved.name, name_is_default=True, device=request.device)
                result = self._load(opened, wish, groups)
            assert result is not None  # not detached
            request.reference, request.device = result.content_digest, result.device
            try:
                attachment = self._attach(request, components, keys, peers=peers)
                attachment.loaded = result
                return attachment
            except NotFoundError:  # of the checkpoint, when it was removed or evicted in between, or of a tensor
                here = result.content_digest, result.device, "resident"
                resident = any((c.content_digest, c.device, c.state) == here for c in self.checkpoints())
                if resident or attempt == _LOADS:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _attach(
        self,
        request: handles_pb2.AttachRequest,
        components: frozenset[str],
        keys: frozenset[TensorKey],
        *,
        peers: bool = False,
    ) -> Attachment:
        self._check()
        return Attachment(self._handles.attach(request), self._connection, components, keys, peers=peers)

    def _check(self) -> None:
        """Refuse in a forked child, and connect anew where the daemon has gone."""
        if self._pid != os.getpid():
            raise ForkedError(
                "this weightd client belongs to the parent process; connect again in the child, or start it with spawn"
            )
        with self._lock:
            if self._closed:
                raise InvalidReferenceError("this weightd client is closed")
            self._connection.renew()
            if self._control is not None and self._control.token != self._handles.token:
                self._control.close()
                self._control = None

    @property
    def _handles(self) -> SocketClient:
        return self._connection.handles

    def _rpc(self) -> RpcClient:
        self._check()
        with self._lock:
            if self._control is None:
                check_grpc_can_start()
                from ._transport.rpc import RpcClient  # the attach path needs no grpc, and its import takes 0.1 s

                self._control = RpcClient(self._connection.path, self._handles.token, self._connection.timeout)
            return self._control
