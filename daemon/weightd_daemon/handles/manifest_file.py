"""A manifest as a file: encoded in columns, in a sealed memfd."""

from __future__ import annotations

import fcntl
import os
import stat
from typing import TYPE_CHECKING

from weightd._manifest import DTYPES, FORM
from weightd._proto.v1 import handles_pb2
from weightd_daemon.core.digest import EMPTY_DIGEST

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightd_daemon.core.blob import Blob
    from weightd_daemon.core.checkpoint import Content
    from weightd_daemon.core.manifest import ContentTensor

_ENCODED_AT_ONCE = 4096
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def encode_manifest(content: Content, device: str, kind: str, segment_bytes: Callable[[int], int]) -> bytes:
    """The manifest of a content (protos/weightd/v1/handles.proto), in columns.

    It is encoded in parts, which protobuf reads as one message: to encode 100,000 tensors at once takes 30 ms, in which
    no other thread runs, the loop's neither.
    """
    components = sorted({entry.component for entry in content.entries} | {file.component for file in content.files})
    component_index = {name: number for number, name in enumerate(components)}
    segment_index = {segment: number for number, segment in enumerate(content.segments)}
    files = [
        handles_pb2.ManifestFile(
            component=component_index[file.component],
            file=file.file,
            metadata=file.metadata or {},
            has_metadata=file.metadata is not None,
        )
        for file in content.files
    ]
    blobs = content.blobs
    head = handles_pb2.Manifest(
        form=FORM,
        content_digest=content.content_digest,
        device=device,
        kind=kind,
        components=components,
        files=files,
        segment_bytes=[segment_bytes(segment) for segment in content.segments],
        digests=b"".join([blob.key.digest if blob is not None else EMPTY_DIGEST for blob in blobs]),
        views=[
            handles_pb2.DerivedView(
                name=view.name, component=component_index[view.component], members=view.members, shape=view.shape
            )
            for view in content.views
        ],
    )
    starts = range(0, len(blobs), _ENCODED_AT_ONCE)
    parts = [slice(start, start + _ENCODED_AT_ONCE) for start in starts]
    columns = (_columns(content.entries[part], blobs[part], segment_index) for part in parts)
    return b"".join([head.SerializeToString(), *(part.SerializeToString() for part in columns)])


def _columns(
    entries: Sequence[ContentTensor], blobs: Sequence[Blob | None], segment_index: Mapping[int, int]
) -> handles_pb2.Manifest:
    return handles_pb2.Manifest(
        names=[entry.name for entry in entries],
        file_indices=[entry.file for entry in entries],
        dtypes=[DTYPES[entry.dtype] for entry in entries],
        ranks=[len(entry.shape) for entry in entries],
        dimensions=[size for entry in entries for size in entry.shape],
        segments=[segment_index[blob.segment] if blob is not None else 0 for blob in blobs],
        offsets=[blob.offset if blob is not None else 0 for blob in blobs],
        lengths=[entry.length for entry in entries],
        variants=[blob.variant if blob is not None else 0 for blob in blobs],
    )


def make_manifest(encoded: bytes) -> int:
    """Return the descriptor of a sealed memfd with an encoded manifest. Errors: OSError."""
    return make_sealed("weightd-manifest", encoded)


def make_sealed(name: str, content: bytes = b"") -> int:
    """Return the descriptor of a memfd that nobody can write to or resize any more. Errors: OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        os.fchmod(descriptor, 0o400)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_manifest(descriptor: int) -> bool:
    """Whether a descriptor is of a memfd as `make_manifest` makes them: nobody can write to it or resize it."""
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        return sealed and stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o400
    except OSError:
        return False
