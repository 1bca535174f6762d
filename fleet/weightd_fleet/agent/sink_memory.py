"""The sink that is the daemon's memory: missing tensors as parts through sealed memfds, then a composition of all.

A part is a small checkpoint of its own, which the daemon checks and shares like any other. Parts that are loaded stay
resident if a fetch is killed, so that the next one finds them by their bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from weightd import _failpoints
from weightd.composing import SEALS, ComposedTensor, TensorSource
from weightd.errors import FormatError, ResourceLimitError, WeightdError
from weightd.types import CheckpointFile
from weightd_daemon.loader.source import LoaderSource

from .blobs import copy_checked
from .resident import DEVICE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightd.client import Client
    from weightd_fleet.core.manifest import FleetManifest
    from weightd_fleet.core.manifest_rows import TensorRow, WeightFile

    from .blobs import BlobReader
    from .resident import HeldTensors

PART_BYTES: Final = 2 << 30
"""Most bytes of a part with more than one tensor."""
_TWINS_BELOW: Final = 64 << 10
"""Equal tensors below this length are stored once per name, as in a load (decision 0005)."""

_one_part = threading.Lock()
"""Held while a part is in this process's memory: several fetches have one at a time, which limits count on."""


class MemorySink:
    """Composes a checkpoint out of tensors that are `held` and parts. `client` must have no other use."""

    def __init__(
        self,
        manifest: FleetManifest,
        client: Client,
        held: HeldTensors,
        name: str,
        *,
        pin: bool,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._manifest = manifest
        self._client = client
        self._held = held
        self._name = name
        self._pin = pin
        self._part_bytes = part_bytes
        self._rows = [row for row in manifest.tensors if row.counts]
        self._copies = Counter(row.digest for row in self._rows if 0 < row.length < _TWINS_BELOW)
        self._parts: list[str] = []
        self._sources: dict[bytes, list[TensorSource]] = {}
        self.content_digest = ""
        """The checkpoint's, once it is composed."""

    @property
    def wanted(self) -> dict[bytes, int]:
        """The tensors that count."""
        return {row.digest: row.length for row in self._rows if row.length}

    def batches(self) -> Iterator[dict[bytes, int]]:
        """The parts: what is not resident, in the order of the files."""
        part: dict[bytes, int] = {}
        size = 0
        for digest, length in self.wanted.items():
            if digest in self._held:
                continue
            needed = length * max(1, self._copies[digest])
            if part and size + needed > self._part_bytes:
                yield part
                part, size = {}, 0
            part[digest] = length
            size += needed
        if part:
            yield part

    def take(self, batch: dict[bytes, int], blobs: BlobReader) -> None:
        """Load a part."""
        tensors = [(digest, length) for digest, length in batch.items() for _ in range(max(1, self._copies[digest]))]
        with _one_part, _memory() as descriptor:
            offset = _write(descriptor, _header([length for _, length in tensors]), 0)
            for digest, length in tensors:
                copy_checked(blobs.pieces(digest), digest, length, _Writer(descriptor, offset))
                offset += length
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            content_digest = self._load(descriptor)
        self._parts.append(content_digest)
        for number, (digest, _) in enumerate(tensors):
            self._sources.setdefault(digest, []).append(TensorSource(content_digest, "", f"r{number}"))

    def finish(self, blobs: BlobReader) -> None:
        """Compose the checkpoint, and remove the parts."""
        files = [_file(file, self._manifest, blobs) for file in self._manifest.files]
        numbers = {(file.component, file.file): number for number, file in enumerate(files)}
        tensors = [
            ComposedTensor(numbers[row.component, row.file], row.name, row.dtype, row.shape, self._source(row))
            for row in self._rows
        ]
        self.content_digest = self._compose(files, tensors)
        for part in self._parts:
            if part != self.content_digest:
                with contextlib.suppress(WeightdError):  # it may be evicted, or in use by another fetch
                    self._client.remove(part, DEVICE)

    def sources(self) -> list[dict[str, Any]]:
        """None: the checkpoint is in no file."""
        return []

    def _source(self, row: TensorRow) -> TensorSource | None:
        if not row.length:
            return None
        if row.digest in self._held:
            return self._held.source(row.digest)
        found = self._sources[row.digest]
        return found.pop() if len(found) > 1 else found[0]

    def _load(self, descriptor: int) -> str:
        _failpoints.reach("fetch.load")
        loaded = self._client.load_memory(descriptor, device=DEVICE)
        assert loaded is not None  # not detached
        return loaded.content_digest

    def _compose(self, files: list[CheckpointFile], tensors: list[ComposedTensor]) -> str:
        _failpoints.reach("fetch.compose")
        composed = self._client.compose(
            files, tensors, name=self._name, device=DEVICE, pin=self._pin, reference=self._manifest.name
        )
        return composed.content_digest


class _Writer:
    """Writes pieces one after the other into a file."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self._descriptor = descriptor
        self._offset = offset

    def __call__(self, piece: memoryview) -> None:
        self._offset = _write(self._descriptor, piece, self._offset)


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of it. Returns where it ends. Errors: ResourceLimitError (no memory)."""
    view = memoryview(data)
    while view:
        try:
            count = os.pwrite(descriptor, view, offset)
        except OSError as error:
            raise ResourceLimitError(
                f"this process has no memory for a part of the checkpoint: {error.strerror}", {"limit": "memory"}
            ) from error
        view, offset = view[count:], offset + count
    return offset


@contextlib.contextmanager
def _memory() -> Iterator[int]:
    descriptor = os.memfd_create("weightd-part", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _header(lengths: list[int]) -> bytes:
    """The header of a safetensors file with tensors of bytes, called r0, r1, …, in this order."""
    directory: dict[str, Any] = {}
    offset = 0
    for number, length in enumerate(lengths):
        directory[f"r{number}"] = {"dtype": "U8", "shape": [length], "data_offsets": [offset, offset + length]}
        offset += length
    encoded = json.dumps(directory, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _file(file: WeightFile, manifest: FleetManifest, blobs: BlobReader) -> CheckpointFile:
    """A file with its metadata, which its frame has. Errors: FormatError (the frame is not the manifest's rows')."""
    with _memory() as descriptor:
        frame = b"".join(blobs.pieces(file.frame)) if file.frame_bytes else b""
        os.ftruncate(descriptor, file.size)  # sparse: tensors take no memory
        for piece in manifest.pieces(file):
            if piece.row is None:
                _write(descriptor, frame[piece.frame_offset : piece.frame_offset + piece.length], piece.offset)
        rows = {row.name: (row.dtype, row.shape, row.offset, row.length) for row in manifest.rows_of(file)}
        layout = LoaderSource(file.path, descriptor).layout()
        found = {one.name: (one.dtype, tuple(one.shape), one.offset, one.length) for one in layout.tensors}
    if found != rows:
        raise FormatError(f"{file.path}: its header lists other tensors than the manifest; publish it again")
    return CheckpointFile(file.component, file.file, layout.metadata)
