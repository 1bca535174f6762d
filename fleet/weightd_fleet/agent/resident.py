"""Which tensors are resident in the daemon's host memory, by the BLAKE3 of their bytes."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

from weightd.composing import TensorSource
from weightd.errors import DaemonUnreachableError, NotFoundError, PermissionDeniedError
from weightd.types import TensorKey
from weightd_daemon.answers import THREADS
from weightd_fleet.core.digests import blob_digest

from .blobs import PIECE
from .inventory import ResidentCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from datetime import datetime

    from weightd.attachment import Attachment
    from weightd.client import Client
    from weightd.types import CheckpointInfo, Stats
    from weightd_fleet.core.manifest import FleetManifest

DEVICE: Final = "host"
"""Agents read and compose in host memory."""


class _Instance(NamedTuple):
    """A checkpoint from its load to its eviction. Its bytes do not change; those of the next with this digest may."""

    content_digest: str
    loaded_at: datetime | None


class _KnownTensors:
    """The tensors of an instance: their lengths, and the digests of those that were hashed."""

    def __init__(self, lengths: dict[TensorKey, int]) -> None:
        self.lengths = lengths
        self.digests: dict[TensorKey, bytes] = {}
        self.keys: dict[bytes, TensorKey] = {}

    def add(self, key: TensorKey, digest: bytes) -> None:
        self.digests[key] = digest
        self.keys.setdefault(digest, key)

    def has_exactly(self, digests: dict[TensorKey, bytes]) -> bool:
        """Whether these are all of its tensors that have bytes, by name and digest."""
        return self.lengths.keys() == digests.keys() and self.digests == digests


class HeldTensors:
    """Resident tensors by digest, which leases keep. They are a BlobReader."""

    def __init__(self, found: dict[bytes, tuple[Attachment, TensorKey]]) -> None:
        self._found = found

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._found

    def pieces(self, digest: bytes) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces."""
        attachment, key = self._found[digest]
        content: memoryview = attachment.buffer(key.name, key.component)
        for offset in range(0, len(content), PIECE):
            yield content[offset : offset + PIECE]

    def source(self, digest: bytes) -> TensorSource:
        """What a composition calls the tensor."""
        attachment, key = self._found[digest]
        return TensorSource(attachment.content_digest, key.component, key.name)


class ResidentTensors:
    """What a daemon has in host memory. Each tensor is hashed once from a load to an eviction, by its own bytes.

    xxh3, by which the daemon finds equal tensors, is never taken for proof. Safe for use from several threads.
    """

    def __init__(self, connect: Callable[[], Client]) -> None:
        self._connect = connect
        self._client: Client | None = None
        self._lock = threading.Lock()
        self._known: dict[_Instance, _KnownTensors] = {}

    def close(self) -> None:
        """Leave the daemon."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def find(self, lengths: Collection[int]) -> set[bytes]:
        """The digests of resident tensors of these lengths. Errors: DaemonUnreachableError, PermissionDeniedError."""
        with self._lock:
            return self._find(frozenset(lengths))

    def stats(self) -> Stats:
        """The daemon's books. Errors: DaemonUnreachableError, PermissionDeniedError."""
        with self._lock:
            return self._connected().stats()

    def whole(self, manifests: Iterable[FleetManifest]) -> list[ResidentCheckpoint]:
        """Those of some manifests whose every tensor is resident in one checkpoint, under its own name.

        Errors: DaemonUnreachableError, PermissionDeniedError.
        """
        wanted = {
            manifest.name: {
                TensorKey(row.component, row.name): row.digest for row in manifest.tensors if row.counts and row.length
            }
            for manifest in manifests
        }
        found: dict[str, ResidentCheckpoint] = {}
        with self._lock:
            for instance, info in self._instances().items():
                known = self._known.get(instance)
                for name, digests in wanted.items() if known else ():
                    if known is not None and known.has_exactly(digests):
                        before = found.get(name, ResidentCheckpoint(name, pinned=False, firm=False))
                        firm = before.firm or info.pinned or info.leases > 0
                        found[name] = ResidentCheckpoint(name, before.pinned or info.pinned, firm)
        return list(found.values())

    @contextlib.contextmanager
    def hold(self, digests: Collection[bytes], lengths: Collection[int]) -> Iterator[HeldTensors]:
        """Hold those of some tensors that are resident. `lengths` are theirs in bytes."""
        wanted = set(digests)
        found: dict[bytes, tuple[Attachment, TensorKey]] = {}
        with contextlib.ExitStack() as stack:
            with self._lock, contextlib.suppress(DaemonUnreachableError, PermissionDeniedError):
                self._find(frozenset(lengths))
                for instance, known in list(self._known.items()):
                    keys = {digest: known.keys[digest] for digest in wanted & known.keys.keys()}
                    attachment = self._attach(instance, keys.values()) if keys else None
                    if attachment is not None:
                        stack.enter_context(attachment)
                        found.update({digest: (attachment, key) for digest, key in keys.items()})
                        wanted -= keys.keys()
            yield HeldTensors(found)

    def _find(self, lengths: frozenset[int]) -> set[bytes]:
        """Hash what is new. Errors: DaemonUnreachableError."""
        present = self._instances()
        self._known = {instance: known for instance, known in self._known.items() if instance in present}
        for instance in present:
            if instance not in self._known:
                self._list(instance)
        for instance, known in list(self._known.items()):
            keys = [key for key, size in known.lengths.items() if size in lengths and key not in known.digests]
            attachment = self._attach(instance, keys) if keys else None
            if attachment is not None:
                with attachment:
                    self._hash(known, attachment, keys)
        return {digest for known in self._known.values() for digest in known.keys}

    def _hash(self, known: _KnownTensors, attachment: Attachment, keys: list[TensorKey]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(lambda key: blob_digest(attachment.buffer(key.name, key.component)), keys)
            for key, digest in zip(keys, digests, strict=True):
                known.add(key, digest)

    def _connected(self) -> Client:
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _instances(self) -> dict[_Instance, CheckpointInfo]:
        return {
            _Instance(found.content_digest, found.loaded_at): found
            for found in self._connected().checkpoints()
            if found.device == DEVICE and found.state == "resident"
        }

    def _list(self, instance: _Instance) -> None:
        assert self._client is not None  # _instances has connected
        with contextlib.suppress(NotFoundError):  # evicted meanwhile
            listed = self._client.tensors(instance.content_digest, DEVICE)
            lengths = {TensorKey(one.component, one.name): one.length for one in listed if one.length}
            self._known[instance] = _KnownTensors(lengths)

    def _attach(self, instance: _Instance, keys: Collection[TensorKey]) -> Attachment | None:
        """Attach tensors; None if the instance is gone, even if the same content digest has been loaded again."""
        assert self._client is not None
        try:
            attachment = self._client.attach(instance.content_digest, device=DEVICE, tensors=keys)
        except NotFoundError:
            return None
        if instance in self._instances():  # asked while the lease keeps what was attached
            return attachment
        attachment.close()
        return None
