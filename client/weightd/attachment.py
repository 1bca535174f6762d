"""An attachment: a checkpoint's tensors, mapped into this process."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from bisect import bisect_right
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from . import _failpoints, _fused
from ._manifest import Manifest, odd
from ._mapping import host
from ._mapping.opening import open_segments
from ._mapping.ranges import MappedExtents
from ._mapping.segments import SegmentToMap
from ._tensor_rows import TensorRows
from .errors import InvalidReferenceError, NotFoundError, WeightdError
from .gguf import GgufTensor
from .types import DerivedView, StoredPlace, TensorInfo, TensorKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from ._manifest import StoredRow
    from ._mapping.ranges import MappedRange
    from ._mapping.segments import MappedSegments, Memory
    from ._transport.connection import DaemonConnection
    from ._transport.handle_socket import ReceivedDescriptors
    from .types import CheckpointFile, LoadResult

Writable = Literal["copy"] | None


class Attachment:
    """A lease on a checkpoint and the mappings that it gave us. Use it as a context manager, or `close` it.

    Tensors outlive it: each keeps its memory and the lease until it is gone itself. No two names share an address, so
    an in-place write to one tensor changes no other.

    On a GPU tensors are for reading. Shared by CUDA VMM (`kind` "cuda_vmm"), their memory is read-only, and the first
    write kills this process's CUDA context: every later call fails. Shared by CUDA IPC ("cuda_ipc"), it is writable for
    want of a way to forbid it, and a write changes what every other process reads. `writable="copy"` gives tensors that
    may be written to. On the host ("host") each process may write: it gets its own copy of the page.
    """

    def __init__(
        self,
        received: ReceivedDescriptors,
        connection: DaemonConnection,
        components: frozenset[str] = frozenset(),
        keys: frozenset[TensorKey] = frozenset(),
        *,
        peers: bool = False,
    ) -> None:
        reply = received.reply
        lease: host.HostMapping | None = None
        try:
            _failpoints.reach("client.received")
            lease = host.map_lease(received.lease, received.lease_bytes)
            self._segments: MappedSegments | None = self._open(received, lease, components, keys, peers)
            _failpoints.reach("client.mapped")
        except BaseException:
            if lease is not None:
                lease.close()  # now, and not when the last traceback that knows of it is gone
            raise
        finally:
            for descriptor in received.descriptors:
                os.close(descriptor)
        self.loaded: LoadResult | None = None
        """What the load brought, where the attach had to load the checkpoint; None where it was resident."""
        self._extents: MappedExtents | None = None
        self._connection = connection
        self._lease = reply.lease
        connection.hold(reply.lease, self.content_digest, self.device, lease)
        self._closed = False

    def _open(
        self,
        received: ReceivedDescriptors,
        lease: host.HostMapping,
        components: frozenset[str],
        keys: frozenset[TensorKey],
        peers: bool,
    ) -> MappedSegments:
        self._manifest = manifest = Manifest(received.read_manifest())
        self.content_digest: str = manifest.content_digest
        self.device: str = manifest.device
        self.kind: str = manifest.kind
        if components or keys:  # the daemon has looked as well, unless the request was too long to name them
            self._tensors = TensorRows(manifest, manifest.select(components, keys))
        else:
            self._tensors = TensorRows(manifest)
        if max(received.reply.segments, default=-1) >= len(manifest.segment_bytes):
            raise odd(f"has {len(manifest.segment_bytes)} segments, and the daemon sent others")
        # A segment is mapped once, and once more for each further name that has the same address in it.
        most: dict[int, int] = dict.fromkeys(received.reply.segments, 1)
        if most:
            for key, copy in self._tensors.copies.items():
                segment = self._tensors[key].segment
                if segment in most:
                    most[segment] = max(most[segment], copy + 1)
        wanted = [
            SegmentToMap(segment, manifest.segment_bytes[segment], handle, most[segment])
            for segment, handle in zip(received.reply.segments, received.handles, strict=True)
        ]
        return open_segments(self.kind, self.device, wanted, lease, peers=peers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._tensors)} tensors"
        return f"<weightd.Attachment {self.content_digest[:19]} on {self.device}: {state}>"

    def close(self) -> None:
        """Give the attachment up. Memory and lease go when the last tensor made from it is gone."""
        if self._closed:
            return
        self.drop()
        with contextlib.suppress(OSError, WeightdError):  # the daemon looks for itself when the connection ends
            self._connection.detach(self._lease)

    def populate(self) -> None:
        """Map the pages of the attached tensors now; otherwise each page is a fault at its first access.

        That moves the time of the faults, and saves little of it. Other threads of Python run meanwhile. On a GPU
        nothing is to be done. Errors: InvalidReferenceError (closed), ResourceLimitError, WeightdError (the kernel is
        older than Linux 5.14, or a page cannot be read).
        """
        segments = self._opened  # for as long as this takes: another thread may close
        if segments.places() and self.kind == "host":
            host.populate((address, length) for address, length, _ in self._by_address)

    def drop(self) -> None:
        """Close without a word to the daemon, which looks for itself. For finalizers: they must not wait."""
        self._closed = True
        self._segments = None

    @property
    def tensors(self) -> Mapping[TensorKey, TensorInfo]:
        """Every attached tensor's place, by (component, name), in file order; it is made when it is asked for.

        Errors, of each use: ServerError (the manifest places a tensor where it cannot be).
        """
        return self._tensors

    @property
    def files(self) -> tuple[CheckpointFile, ...]:
        """The files of the checkpoint, as it records them; `TensorInfo.file` is an index into them."""
        return self._manifest.files

    @property
    def torch_device(self) -> str:
        """What torch calls the device in this process, such as "cuda:1".

        Errors: InvalidReferenceError (closed), DeviceMismatchError.
        """
        return self._opened.torch_device

    @property
    def peers(self) -> tuple[str, ...]:
        """The other GPUs that may read the memory, as torch calls them: those that `attach(…, peers=True)` found.

        Empty on the host, and with CUDA IPC, where access follows the process's own settings (torch enables it by
        itself). Errors: InvalidReferenceError (closed).
        """
        return self._opened.peers

    @property
    def views(self) -> Mapping[TensorKey, DerivedView]:
        """What frameworks fuse, by (component, name), where its members are attached and lie one behind the other.

        Errors: ServerError (the manifest lists what cannot be).
        """
        return {key: found.view for key, found in self._views.items()}

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the checkpoint's parts; ("",) for a plain checkpoint."""
        return self._manifest.components

    def metadata(self, component: str = "", file: str | None = None) -> dict[str, str] | None:
        """A file's own metadata, None where it has none; `file` may be left out where the component has one file.

        Errors: NotFoundError, InvalidReferenceError (which file?).
        """
        there = [one for one in self._manifest.files if one.component == component and file in (None, one.file)]
        if not there:
            raise NotFoundError(f"file {file!r} of component {component!r} is not in the checkpoint")
        if len(there) > 1:
            names = ", ".join(repr(one.file) for one in there[:5])
            raise InvalidReferenceError(f"component {component!r} has {len(there)} files; say which: {names}")
        metadata = there[0].metadata
        return None if metadata is None else dict(metadata)

    def buffer(self, name: str, component: str = "") -> Memory:
        """The bytes of one tensor, which the buffer keeps; an empty tensor's are `memoryview(b"")`.

        On the host a memoryview, writable (copy-on-write); on a GPU a `cuda.core.Buffer`, for any DLPack consumer.
        Errors: NotFoundError, InvalidReferenceError (closed), DeviceError, ForkedError (on a GPU, in a forked child).
        """
        segments, info = self._opened, self._find(name, component)
        if not info.length:
            return memoryview(b"")
        try:
            return segments.buffer(info.segment, self._copy(info), info.offset, info.length)
        except KeyError:
            raise _only_manifest(name) from None

    def gguf_tensor(self, name: str, component: str = "") -> GgufTensor:
        """One tensor as ggml describes it: type, shape, bytes, and `dequantize`. Errors: those of `buffer`."""
        info = self._find(name, component)
        return GgufTensor(name, info.dtype.removeprefix("GGML_"), info.shape, self.buffer(name, component))

    def tensor(self, name: str, component: str = "", *, writable: Writable = None) -> torch.Tensor:
        """One tensor, with a storage of its own; with `writable="copy"` a private copy, for what is written in place.

        Of one in ggml's blocks (dtype "GGML_…") it is the bytes: torch.uint8 of shape (*shape[:-1], bytes of a row).
        Errors: NotFoundError, FormatError (torch has no such dtype), InvalidReferenceError (closed),
        DeviceMismatchError (torch cannot use the device), DeviceError, ForkedError (on a GPU, in a forked child).
        """
        info = self._find(name, component)
        return self._make(self._opened, [info[1:7]], {name: self._copy(info)}, writable)[name]

    def view(self, name: str, component: str = "", *, writable: Writable = None) -> torch.Tensor:
        """One of `views` as a tensor with a storage of its own. It has the addresses of its members: use it or them.

        Errors: as `tensor`, and ServerError.
        """
        try:
            found = self._views[TensorKey(component, name)]
        except KeyError:
            inside = f" of component {component!r}" if component else ""
            raise NotFoundError(f"view {name!r}{inside} is not attached; `views` has those that are") from None
        return self._make(self._opened, [found.info[1:7]], {name: found.copy}, writable)[name]

    def state_dict(self, component: str | None = None, *, writable: Writable = None) -> dict[str, torch.Tensor]:
        """The tensors of one component by name, in file order; `component` may be left out where there is one only.

        `writable` is as in `tensor`. Errors: InvalidReferenceError (which component?), those of `tensor`.
        """
        segments, rows = self._opened, self._tensors
        attached = rows.components or {""}
        if component is None:
            if len(attached) > 1:
                names = ", ".join(map(repr, sorted(attached)))
                raise InvalidReferenceError(f"the checkpoint has several components; say which: {names}")
            (component,) = attached
        elif component not in attached:
            raise NotFoundError(f"component {component!r} is not attached; there are {sorted(attached)}")
        copies = {key.name: copy for key, copy in rows.copies.items() if key.component == component}
        return self._make(segments, rows.stored(component), copies, writable)

    @cached_property
    def _views(self) -> dict[TensorKey, _fused.View]:
        return _fused.views(self._manifest.views, self._manifest.tensors, self._tensors, self._tensors.copies)

    def holds(self, address: int, length: int) -> bool:
        """Whether `length` bytes at an address of this process lie in memory that is attached.

        Errors: InvalidReferenceError (closed).
        """
        segments = self._opened
        if self._extents is None:
            self._extents = MappedExtents(segments.ranges())
        return self._extents.hold(address, length)

    def ranges(self) -> list[MappedRange]:
        """At which addresses of this process the attached memory lies. Errors: InvalidReferenceError (closed)."""
        return self._opened.ranges()

    def span(self, address: int, length: int) -> Memory | None:
        """`length` bytes from an address of this process on, as `buffer` returns them; None where not all are attached.

        They may be those of several tensors that lie one behind the other (`TensorInfo.segment` and `offset` say where
        each lies), for whatever reason they do. Errors: InvalidReferenceError (closed), those of `buffer`.
        """
        segments = self._opened
        at = bisect_right(self._places, (address, sys.maxsize)) - 1
        if at < 0 or length <= 0:
            return None
        start, size, segment, copy = self._places[at]
        if address + length > start + size:
            return None
        return segments.buffer(segment, copy, address - start, length)

    def locate(self, tensor: torch.Tensor) -> StoredPlace | None:
        """Where a tensor's bytes lie in attached memory, and of which attached tensors they are; None where not all do.

        The bytes are those from its first element to its last. Errors: InvalidReferenceError (closed).
        """
        self._opened  # noqa: B018  # closed?
        if not tensor.numel() or tensor.is_meta:
            return None
        address = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
        length = (last + 1) * tensor.element_size()
        if not self.holds(address, length):
            return None
        first = max(0, bisect_right(self._by_address, (address, sys.maxsize)) - 1)
        names = []
        for start, size, key in self._by_address[first:]:
            if start >= address + length:
                break
            if start + size > address:
                names.append(key)
        return StoredPlace(address, length, tuple(names))

    @cached_property
    def _by_address(self) -> list[tuple[int, int, TensorKey]]:
        """Address, length and name of each attached tensor that has bytes, by address."""
        copies = self._tensors.copies
        begin = {(segment, copy): address for address, _, segment, copy in self._places}
        return sorted(
            (begin[info.segment, copies.get(key, 0)] + info.offset, info.length, key)
            for key, info in self._tensors.items()
            if info.length
        )

    @cached_property
    def _places(self) -> list[tuple[int, int, int, int]]:
        """Address, length, segment and copy of each mapping, by address."""
        return sorted((*place, *key) for key, place in self._opened.places().items())

    def load_into(self, module: torch.nn.Module, component: str | None = None, *, strict: bool = True) -> Any:
        """Put attached tensors in the place of a module's parameters, without a copy: assign, tie, freeze.

        As `module.load_state_dict(…, assign=True)`, and it returns what that returns: missing and unexpected keys. What
        is more: parameters that are tied stay tied, also where the checkpoint has one of their names only; buffers get
        private copies, for frameworks write to them; what is shared has `requires_grad=False`. The module may be on
        torch's "meta" device, but buffers that a checkpoint does not have are then the caller's to make.
        Errors: as of `state_dict`; RuntimeError, as torch raises it (keys with `strict`, shapes).
        """
        from ._assign import assign

        return assign(module, self.state_dict(component), self, strict=strict)

    def _find(self, name: str, component: str) -> TensorInfo:
        try:
            return self._tensors[TensorKey(component, name)]
        except KeyError:
            inside = f" of component {component!r}" if component else ""
            raise NotFoundError(f"tensor {name!r}{inside} is not attached") from None

    def _copy(self, info: TensorInfo) -> int:
        """Which mapping of the segment is this tensor's."""
        copies = self._tensors.copies
        return copies.get(TensorKey(info.component, info.name), 0) if copies else 0

    def _make(
        self, segments: MappedSegments, rows: Iterable[StoredRow], copies: Mapping[str, int], writable: Writable
    ) -> dict[str, torch.Tensor]:
        """Tensors by name; `copies` has those whose bytes are not in the first mapping of their segment."""
        if writable not in (None, "copy"):
            raise InvalidReferenceError(f"writable {writable!r}: must be None or 'copy'")
        made, make, buffer, device = {}, self._make_tensor, segments.buffer, segments.torch_device
        # One call for the bytes and one for the tensor: there may be 20,000.
        for name, dtype, shape, segment, offset, length in rows:
            try:
                memory = buffer(segment, copies.get(name, 0), offset, length) if length else None
            except KeyError:
                raise _only_manifest(name) from None
            tensor = make(memory, device, name, dtype, shape)
            made[name] = tensor.clone() if writable else tensor
        return made

    @cached_property
    def _make_tensor(self) -> Callable[[Memory | None, str, str, str, tuple[int, ...]], torch.Tensor]:
        from ._tensors import make_tensor

        return make_tensor

    @property
    def _opened(self) -> MappedSegments:
        if self._segments is None:
            raise InvalidReferenceError("this attachment is closed; attach again")
        return self._segments


def _only_manifest(name: str) -> NotFoundError:
    return NotFoundError(f"tensor {name!r}: only the manifest is attached")
